"""The whole way on the documentation of the running Python: train, dump, index, mix; one table.

`make demo`, or `python -m benchmarks.demo`: the commands it prints are the ones to run by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

CONFIG = "configs/python_docs/lm.yaml"
RUN = Path("runs/python_docs")
CHECKPOINT = RUN / "checkpoints" / "best.ckpt"
STAGES = {
    "training": ["train.py", "--config", CONFIG],
    "datastore, index, tuning, evaluation": [
        *("evaluate.py", "--config", CONFIG, "--ckpt_path", str(CHECKPOINT)),
        *("--knnlm", "--knn.lmbda", "auto"),
    ],
}


def main() -> None:
    """Runs the stages and prints their figures; writes them to runs/python_docs/demo.json."""
    console = Console()
    for name, command in STAGES.items():
        console.rule(name)
        console.print("python " + " ".join(command), style="bold", soft_wrap=True)
        done = subprocess.run([sys.executable, *command])
        if done.returncode:
            sys.exit(done.returncode)
    results = json.loads((RUN / "results.json").read_text())
    training = json.loads((RUN / "training.json").read_text())
    summary = summarize(results, training)
    (RUN / "demo.json").write_text(json.dumps(summary, indent=1) + "\n")
    console.print(as_table(summary))
    console.print(f"TensorBoard: tensorboard --logdir {RUN.parent}")


def summarize(results: dict, training: dict) -> dict:
    """Perplexities, tokens a second of each stage (None where its product was there already), and
    the size of the datastore."""
    knn, seconds = results["knn"], results["stage_seconds"]
    rows = knn["datastore_rows"]
    directory = Path(knn["datastore"])
    building = [seconds[stage] for stage in ("index_train", "index_add") if stage in seconds]
    return {
        "perplexity": {"LM": results["ppl"], "kNN-LM": knn["ppl"]},
        "lmbda": knn["lmbda"],
        "temperature": knn["temperature"],
        "tokens_per_second": {
            "training": training["tokens_per_second"],
            "datastore": rows / seconds["datastore"] if "datastore" in seconds else None,
            f"index ({knn['index']})": rows / sum(building) if building else None,
            "LM evaluation": results["tokens_per_second"],
            "kNN-LM evaluation": knn["tokens_per_second"],
        },
        "datastore": {
            "rows": rows,
            "megabytes": sum(f.stat().st_size for f in directory.iterdir()) / 1e6,
        },
    }


def as_table(summary: dict) -> Table:
    """The summary as what `make demo` shows."""
    table = Table("", "", title="python_docs, test split")
    names = {
        "LM": "perplexity of the LM",
        "kNN-LM": f"perplexity of kNN-LM (lmbda {summary['lmbda']:g}, "
        f"temperature {summary['temperature']:.3g}, tuned on the validation split)",
    }
    for name, ppl in summary["perplexity"].items():
        table.add_row(names[name], f"{ppl:.2f}")
    table.add_section()
    for stage, rate in summary["tokens_per_second"].items():
        table.add_row(f"{stage}, tokens per second", f"{rate:,.0f}" if rate else "was there")
    table.add_section()
    store = summary["datastore"]
    table.add_row("datastore", f"{store['rows']:,} keys, {store['megabytes']:.0f} MB with index")
    return table


if __name__ == "__main__":
    main()
