"""The whole way on the documentation of the running Python: train, dump, index, mix with neighbours
and with all memories, train a GNN-LM; one table.

`make demo`, or `python -m benchmarks.demo`: the commands it prints are the ones to run by hand.
"""

import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from neighborlm.programs.places import as_json, write_all

CONFIGS = Path("configs/python_docs")
RUN, GNN_RUN = Path("runs/python_docs"), Path("runs/python_docs-gnn_lm")
LM = f"{RUN}/checkpoints/best.ckpt"
MEMORIES = RUN / "memories.json"
STAGES = {
    "LM": ["train.py", "--config", f"{CONFIGS}/lm.yaml"],
    "datastore, index, kNN-LM": [
        *("evaluate.py", "--config", f"{CONFIGS}/lm.yaml", "--ckpt_path", LM),
        "--knnlm",
    ],
    "all memories": [
        *("evaluate.py", "--config", f"{CONFIGS}/lm.yaml", "--ckpt_path", LM),
        *("--memories", "knn,ngram,recent,automaton", "--output", str(MEMORIES)),
    ],
    "neighbour tables, GNN-LM": [
        *("train.py", "--config", f"{CONFIGS}/gnn_lm.yaml", "--model.lm_checkpoint", LM)
    ],
    "GNN-LM + kNN": [
        *("evaluate.py", "--config", f"{CONFIGS}/gnn_lm.yaml"),
        *("--ckpt_path", f"{GNN_RUN}/checkpoints/best.ckpt", "--knnlm"),
    ],
}


def main() -> None:
    """Runs the stages and prints their figures; writes them to runs/python_docs/demo.json."""
    console = Console(markup=False)
    for name, command in STAGES.items():
        console.rule(name)
        console.print("python " + " ".join(command), style="bold", soft_wrap=True)
        done = subprocess.run([sys.executable, *command])
        if done.returncode:
            sys.exit(done.returncode)
    mixtures = json.loads(MEMORIES.read_text())["table"]
    summary = summarize(*(read(run) for run in (RUN, GNN_RUN)), mixtures)
    write_all({RUN / "demo.json": as_json(summary)})
    console.print(as_table(summary))
    console.print(f"TensorBoard: tensorboard --logdir {RUN.parent}")


def read(run: Path) -> dict:
    """What the programs said of a run."""
    names = ("results", "training")
    return {name: json.loads((run / f"{name}.json").read_text()) for name in names}


def summarize(lm: dict, gnn: dict, mixtures: list[dict]) -> dict:
    """Perplexities, tokens a second of each stage (None where its product was there already), and
    the size of the datastore.

    Args:
        lm: what `read` gives of the LM's run.
        gnn: the same of the GNN-LM's.
        mixtures: of the LM and its memories: the LM, each memory with it, and all together.
    """
    results, mixed = lm["results"], gnn["results"]
    knn, seconds = results["knn"], results["stage_seconds"]
    rows = knn["datastore_rows"]
    directory = Path(knn["datastore"])
    building = [
        seconds[stage]
        for stage in ("index_train", "index_add", "index_measure")
        if stage in seconds
    ]
    searching = gnn["training"]["stage_seconds"].get("neighbors_train")
    return {
        "perplexity": {
            "LM": results["ppl"],
            "kNN-LM": knn["ppl"],
            **{row["name"]: row["ppl"] for row in mixtures if row["memories"] not in ([], ["knn"])},
            "GNN-LM": mixed["gnn"]["ppl"],
            "GNN-LM + kNN": mixed["knn"]["ppl"],
        },
        "tuned": {
            name: {"lmbda": found["lmbda"], "temperature": found["temperature"]}
            for name, found in (("kNN-LM", knn), ("GNN-LM + kNN", mixed["knn"]))
        },
        "tokens_per_second": {
            "LM training": lm["training"]["tokens_per_second"],
            "datastore": rows / seconds["datastore"] if "datastore" in seconds else None,
            f"index ({knn['index']})": rows / sum(building) if building else None,
            "LM evaluation": results["tokens_per_second"],
            "kNN-LM evaluation": knn["tokens_per_second"],
            "evaluation with all memories": mixtures[-1]["tokens_per_second"],
            "neighbour table": rows / searching if searching else None,
            "GNN-LM training": gnn["training"]["tokens_per_second"],
            "GNN-LM evaluation": mixed["gnn"]["tokens_per_second"],
        },
        "datastore": {
            "rows": rows,
            "megabytes": sum(f.stat().st_size for f in directory.iterdir()) / 1e6,
        },
    }


def as_table(summary: dict) -> Table:
    """The summary as what `make demo` shows."""
    table = Table("", "", title="python_docs, test split")
    for name, ppl in summary["perplexity"].items():
        tuned = summary["tuned"].get(name)
        how = ""
        if tuned:
            how = f" (tuned: lmbda {tuned['lmbda']:g}, temperature {tuned['temperature']:.3g})"
        table.add_row(f"perplexity of {name}{how}", f"{ppl:.2f}")
    table.add_section()
    for stage, rate in summary["tokens_per_second"].items():
        table.add_row(f"{stage}, tokens per second", f"{rate:,.0f}" if rate else "was there")
    table.add_section()
    store = summary["datastore"]
    table.add_row(
        "datastore",
        f"{store['rows']:,} keys, {store['megabytes']:.0f} MB with all that is made of them",
    )
    return table


if __name__ == "__main__":
    main()
