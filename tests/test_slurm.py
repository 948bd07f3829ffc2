"""scripts/slurm: the jobs of submit.sh wait for one another, and do what they are for."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from small import ROOT, SMALL

SLURM = ROOT / "scripts" / "slurm"
GNN = (
    *("--data.tokens_per_sample", "24", "--data.context_window", "12", "--data.max_tokens", "96"),
    *("--data.threshold", "0", "--neighbors.k", "4", "--neighbors.exclude_window", "30"),
    *("--model.heads", "2", "--trainer.max_steps", "4", "--trainer.val_check_interval", "2"),
    *("--trainer.enable_progress_bar", "false"),
)
SBATCH = """#!/bin/bash
number=$(($(wc -l < submitted) + 100))
echo "$*" >> submitted
SLURM_NNODES=1 SLURM_NTASKS_PER_NODE=1 SLURM_CPUS_PER_TASK=1 bash "${!#}" > "log$number" 2>&1 ||
    { cat "log$number" >&2; exit 1; }
echo "$number;cluster"
"""
"""Runs the job at once."""
SRUN = '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n'
"""Runs one task."""
PYTHON = """#!/bin/bash
printf '%s\\0' "$OMP_NUM_THREADS" "$@" >> commands
echo >> commands
"""
"""Keeps what it was to run, to be run by a process that need not import all again."""


@pytest.fixture
def cluster(workplace, tmp_path) -> Path:
    """A folder like the repository's root, with a corpus and a trained LM."""
    for name in ("words", "runs"):
        (tmp_path / name).symlink_to(workplace / name)
    for name in ("train.py", "evaluate.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    for name, script in (("sbatch", SBATCH), ("srun", SRUN), ("python", PYTHON)):
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "submitted").touch()
    return tmp_path


def submit(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess:
    """submit.sh on the corpus."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        [SLURM / "submit.sh", *options],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_jobs_wait_for_one_another_and_do_their_part(cluster, run_program):
    done = submit(
        cluster,
        "--partition=short",
        CONFIG=SMALL[1],
        CKPT="runs/words/checkpoints/best.ckpt",
        CORPUS="words",
        NODES="2",
        INDEX="IVF8,SQ8",
        KNN="--knn.k 8",
        EXTRA=" ".join((*SMALL[2:], "--output", "lm.json")),
        GNN_CONFIG=str(ROOT / "configs/text/gnn_lm.yaml"),
        GNN_CKPT="gnn/checkpoints/best.ckpt",
        GNN_EXTRA=" ".join((*GNN, "--trainer.default_root_dir", "gnn")),
    )
    assert done.returncode == 0, done.stderr
    jobs = [line.split() for line in (cluster / "submitted").read_text().splitlines()]
    names = [Path(job[-1]).stem for job in jobs]
    assert names == ["datastore", "index", "evaluate", "gnn", "evaluate"]
    after = [[f"afterok:{n}"] for n in (100, 101, 101, 103)]
    found = [[o.split("=")[1] for o in job if o.startswith("--dependency")] for job in jobs]
    assert found == [[], *after]
    nodes = [next(o for o in job if o.startswith("--nodes")) for job in jobs]
    assert nodes == [f"--nodes={n}" for n in (2, 1, 2, 2, 2)]
    assert all({"--parsable", "--partition=short"} <= set(job) for job in jobs)
    for command in (cluster / "commands").read_text().splitlines():
        threads, program, *flags = command.split("\0")[:-1]
        assert threads == "1"
        run_program(cluster, program, *flags)
    for results in (cluster / "lm.json", cluster / "gnn/results.json"):
        assert json.loads(results.read_text())["knn"]["tuned"]
    assert (cluster / "datastores/words/train/IVF8_SQ8-l2.faiss").is_file()
    assert "gnn" in json.loads((cluster / "gnn/results.json").read_text())


@pytest.mark.parametrize("job", sorted(SLURM.glob("*.sbatch")), ids=lambda job: job.stem)
def test_a_job_looks_for_the_model_where_its_training_leaves_it(job):
    said = dict(re.findall(r"^(\w+)=\$\{\w+:-(.*)\}", job.read_text(), re.MULTILINE))
    config = (ROOT / "configs/wikitext103/lm.yaml").read_text()
    assert "default_root_dir" not in config  # so that it is runs/<corpus>
    assert f"\n  corpus: {said['CORPUS']}\n" in config
    assert said["CKPT"] == f"runs/{said['CORPUS']}/checkpoints/best.ckpt"


def test_nothing_is_submitted_where_a_setting_or_a_job_is_missing(cluster):
    done = submit(cluster, CONFIG="lm.yaml", CKPT="lm.ckpt")
    assert done.returncode != 0
    assert "CORPUS: expected a folder" in done.stderr
    (cluster / "bin/sbatch").write_text("#!/bin/bash\necho called >> submitted\nexit 1\n")
    done = submit(cluster, CONFIG="lm.yaml", CKPT="lm.ckpt", CORPUS="words")
    assert done.returncode != 0
    assert (cluster / "submitted").read_text() == "called\n"
