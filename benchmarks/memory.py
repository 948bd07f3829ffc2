"""Shows that memory does not grow with the datastore: writes one, builds its index and evaluates
with it at two sizes, eight times apart, the larger under a limit that its own keys would break.

    python -m benchmarks.memory --output memory.json

What is limited and counted is memory of the process's own (RLIMIT_DATA, VmData, RssAnon of Linux);
pages of mapped files belong to the page cache.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console

from benchmarks.measuring import CONFIGS, MadeUp, environment, new_table
from neighborlm.programs.exits import exit_with_one_sentence
from neighborlm.programs.places import as_json, check_writable, write_all

STAGES = {
    "datastore": ["--save_datastore"],
    "index": ["--build_index"],
    "kNN evaluation": ["--knnlm", "--knn.k", "64", "--knn.lmbda", "0.25"],
}
FIELDS = {"RssAnon": "resident", "VmData": "allocated"}


def peaks_of(command: list[str], cwd: Path, limit: int | None) -> dict[str, int]:
    """Runs a command; the largest amounts of its own memory, resident and allocated, in bytes.

    Raises:
        RuntimeError: it fails, such as for want of memory.
    """

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    peaks = dict.fromkeys(FIELDS.values(), 0)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=cwd, stdout=said, stderr=said, preexec_fn=set_limit, env=environ()
        )
        while process.poll() is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except ProcessLookupError:
                break
            for line in status.splitlines():
                name, _, value = line.partition(":")
                if name in FIELDS:
                    amount = 1024 * int(value.split()[0])
                    peaks[FIELDS[name]] = max(peaks[FIELDS[name]], amount)
            time.sleep(0.02)
        said.seek(0)
        if process.wait():
            raise RuntimeError(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    return peaks


def environ() -> dict[str, str]:
    """So that the programs are found from another folder."""
    return {**os.environ, "PYTHONPATH": str(CONFIGS.parent.parent)}


@exit_with_one_sentence
def run(output: Path, rows: int = 100_000, width: int = 512, work_dir: Path | None = None) -> None:
    """Measures, prints a table and writes it as JSON.

    Args:
        output: JSON file.
        rows: of the smaller datastore.
        width: of the keys.
        work_dir: where texts, models and datastores are made.
    """
    check_writable(output, "--output")
    here = CONFIGS.parent.parent
    results, limit = [], None
    with tempfile.TemporaryDirectory(dir=work_dir) as folder:
        for size in (rows, 8 * rows):
            place = Path(folder) / str(size)
            made_up = MadeUp(size, test_tokens=4096, width=width, layers=1)
            made_up.write(place / "text")
            program, *flags = made_up.training
            data = ["--data.corpus", "text", "--data.max_tokens", "1024"]
            train = [*flags, "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", *data]
            peaks_of([sys.executable, str(here / program), *train], place, None)
            for stage, flags in STAGES.items():
                command = [sys.executable, str(here / "evaluate.py"), *flags, *data]
                command += ["--config", f"{CONFIGS}/lm.yaml", "--knn.dtype", "fp32"]
                command += ["--ckpt_path", "runs/text/checkpoints/last.ckpt"]
                command += ["--knn.index", "IVF256,SQfp16"]
                peaks = peaks_of(command, place, limit)
                results.append({"stage": stage, "rows": size, "limit": limit, **peaks})
            if limit is None:
                largest = max(result["allocated"] for result in results)
                limit = largest + 8 * rows * width * 2  # what its keys take in halves
    table = new_table(
        f"own memory in MB; keys {rows * width * 2 / 1e6:.0f} MB and eight times as much, then "
        f"under a limit of {limit / 1e6:.0f} MB",
        *("keys", "resident", "allocated"),
    )
    for result in results:
        amounts = (f"{result[name] / 1e6:,.0f}" for name in ("resident", "allocated"))
        table.add_row(result["stage"], f"{result['rows']:,}", *amounts)
    Console(markup=False).print(table)
    about = environment(os.cpu_count() or 1)
    write_all({output: as_json({**about, "results": results})})


if __name__ == "__main__":
    auto_cli(run, as_positional=False)
