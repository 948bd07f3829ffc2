"""Two hosts that stand on this machine as network namespaces joined by a bridge: `make test-hosts`,
as root on Linux."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from small import ROOT, SMALL, write_corpus

pytestmark = pytest.mark.hosts

CKPT = ("--ckpt_path", "runs/words/checkpoints/best.ckpt")
KNN = ("--knnlm", "--knn.k", 8, "--knn.index", "IVF8,SQ8", "--knn.nprobe", 8, "--knn.lmbda", 0.25)
PORT = 29621


def ip(*args: object) -> None:
    """Sets the network up or down."""
    subprocess.run(["ip", *map(str, args)], check=True, capture_output=True)


class Hosts:
    """Network namespaces h0 and h1 with the addresses 10.73.0.1 and 10.73.0.2."""

    def __init__(self) -> None:
        self.name = f"nlm{os.getpid() % 100000}"
        self.names = [f"{self.name}h{i}" for i in range(2)]

    def __enter__(self) -> "Hosts":
        ip("link", "add", self.name, "type", "bridge")
        ip("link", "set", self.name, "up")
        for i, host in enumerate(self.names):
            ip("netns", "add", host)
            ip("link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", host, "master", self.name, "up")
            ip("-n", host, "address", "add", f"10.73.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host, "link", "set", device, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for what in (("netns", "delete", host) for host in self.names):
            subprocess.run(["ip", *what], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", self.name], check=False, capture_output=True)

    def link(self, i: int, state: str) -> None:
        """Cuts or mends the link of a host."""
        ip("link", "set", self.names[i], state)

    def start(self, i: int, cwd: Path, *flags: object) -> subprocess.Popen:
        """evaluate.py on a host, one of two, by torchrun."""
        torchrun = (
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", i),
            *("--nproc-per-node", 1, "--rdzv-backend", "static"),
            *("--rdzv-endpoint", f"10.73.0.1:{PORT}", "--local-addr", f"10.73.0.{i + 1}"),
        )
        on_host = ("ip", "netns", "exec", self.names[i], "unshare", "--uts", "sh", "-c")
        named = f'hostname host{i}; exec "$@"'
        trainer = ("--trainer.num_nodes", 2, "--trainer.devices", 1, "--trainer.strategy", "ddp")
        program = (ROOT / "evaluate.py", *SMALL, "--data.corpus", "words", *CKPT, *flags, *trainer)
        with open(cwd / f"host{i}", "w") as said:
            return subprocess.Popen(
                [*on_host, named, "sh", *map(str, (*torchrun, *program))],
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "eth0"},
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, cwd: Path, *flags: object) -> None:
        """evaluate.py on both hosts, to its end."""
        running = [self.start(i, cwd, *flags) for i in range(2)]
        try:
            statuses = [process.wait(timeout=240) for process in running]
        finally:
            end(running)
        assert statuses == [0, 0], said(cwd)


def end(processes: list[subprocess.Popen]) -> None:
    """With all that they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def said(cwd: Path) -> str:
    """What both hosts printed."""
    return "\n".join((cwd / f"host{i}").read_text() for i in range(2))


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two of them; skips where they cannot be made."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("network namespaces need root and the programs ip and unshare")
    hosts = Hosts()
    try:
        with hosts:
            yield hosts
    except subprocess.CalledProcessError as error:
        hosts.__exit__()
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")


@pytest.fixture
def folder(workplace, tmp_path) -> Path:
    """A folder of its own beside the workplace's corpus and run."""
    for name in ("words", "runs"):
        (tmp_path / name).symlink_to(workplace / name)
    return tmp_path


def figures(path: Path) -> tuple[str, str]:
    """The perplexities, as printed."""
    results = json.loads(path.read_text())
    return f"{results['ppl']:.2f}", f"{results['knn']['ppl']:.2f}"


def test_two_hosts_find_what_one_process_finds(hosts, folder, run_program):
    flags = (*SMALL, "--data.corpus", "words", *CKPT, *KNN)
    one = ("--knn.datastore", "one", "--output", "one.json")
    run_program(folder, "evaluate.py", *flags, *one)
    hosts.run(folder, *KNN, "--knn.datastore", "two", "--output", "two.json")
    assert (folder / "one/keys.npy").read_bytes() == (folder / "two/keys.npy").read_bytes()
    assert figures(folder / "two.json") == figures(folder / "one.json")


def test_a_cut_link_stops_both_hosts_and_the_command_goes_on(hosts, workplace, folder, run_program):
    """The text is long enough for the link to be cut in the middle of it."""
    (folder / "words").unlink()
    write_corpus(folder / "long/words", lines=(6000, 30, 30))
    (folder / "words").symlink_to(folder / "long/words")
    dictionary = ("--data.dictionary", workplace / "runs/words/dict.txt")
    flags = (*KNN, *dictionary, "--data.max_tokens", 24, "--knn.datastore", "cut", "--threads", 1)
    flags = (*flags, "--output", "cut.json")
    started = [hosts.start(i, folder, *flags, "--lost_after", 6) for i in range(2)]
    try:
        deadline = time.monotonic() + 120
        while not (folder / "cut/written.npy").exists() or not (folder / "cut/keys.npy").exists():
            assert time.monotonic() < deadline, said(folder)
            assert all(process.poll() is None for process in started), said(folder)
            time.sleep(0.05)
        time.sleep(3)
        hosts.link(1, "down")
        statuses = [process.wait(timeout=90) for process in started]
    finally:
        end(started)
        hosts.link(1, "up")
    assert 0 not in statuses
    for here, there in ((0, 1), (1, 0)):
        sentence = rf"error: rank {there} on host{there} is gone.*; rank {here} on host{here} stops"
        assert re.search(sentence, (folder / f"host{here}").read_text()), said(folder)
    assert not json.loads((folder / "cut/manifest.json").read_text())["complete"]
    hosts.run(folder, *flags)
    assert "rows are written; going on" in said(folder)
    one = (*SMALL, "--data.corpus", "words", *CKPT, *KNN, *dictionary, "--data.max_tokens", 24)
    run_program(folder, "evaluate.py", *one, "--knn.datastore", "one", "--output", "one.json")
    assert figures(folder / "cut.json") == figures(folder / "one.json")
