"""The end of a process because of another one of its run: one sentence, unless its own program ends
first and says why. Before all ranks are connected, processes that have started others, or were
started, notice one another's end here; afterwards they do by `rank_watch`."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

GRACE_SECONDS = 30.0
"""For this process to end by itself, when another stopped with a message of its own."""
LOOK_SECONDS = 0.2
"""How often a process looks whether another one is still there."""
STARTER = "NEIGHBORLM_STARTER"
"""The environment variable by which ranks know the process that has started them."""
WORDS = {
    "gone": "is gone: its process died or its host cannot be reached",
    "stop": "has stopped",
    "ended": "has ended",
}
"""What became of the other one."""


class Member(NamedTuple):
    """A rank and the name of its host."""

    rank: int | str
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Watch(Protocol):
    """What tells the other ranks that this one ends."""

    def leave(self, how: Literal["end", "stop"]) -> None:
        """Tells them."""


class Ending:
    """How this process ends because of another.

    Attributes:
        reason: the sentence about the other one, once `is_known`.
        watch: by which all ranks notice one another's end, once they are connected.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.is_known = threading.Event()
        self.watch: Watch | None = None
        self.is_watched = threading.Event()
        self.lock = threading.Lock()  # one thread says why
        self.by_itself = False

    def because_of(self, other: Member, me: Member, what: str) -> None:
        """Ends this process, unless it ends by itself meanwhile.

        Args:
            what: one of `WORDS`.
        """
        self.reason = (
            f"{other} {WORDS[what]}; {me} stops too, and the same command goes on from what is on "
            "disk"
        )
        self.is_known.set()
        if what == "stop":
            time.sleep(GRACE_SECONDS)
        with self.lock:
            if not self.by_itself:
                print(f"error: {self.reason}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait for the other rank in a library

    def begin_watch(self, watch: "Watch") -> None:
        """From now on this tells of the others."""
        self.watch = watch
        self.is_watched.set()

    def leave(self, how: Literal["end", "stop"]) -> None:
        """From now on this process ends by itself, having done its part or because of an error; the
        others are told."""
        with self.lock:
            self.by_itself = True
        if self.watch is not None:
            self.watch.leave(how)

    def reason_to_stop(self, seconds: float = 2.0) -> str | None:
        """The sentence about another rank that explains a failure of this one, if there is one.

        Args:
            seconds: to wait for it; a library may have noticed first.
        """
        if self.watch is not None and self.is_known.wait(seconds):
            return self.reason
        return None

    def follow_starter(self) -> None:
        """Ends this process with the one that has started it, where that is one of ours; that is
        the first rank of the host where Lightning starts the others."""
        starter = os.environ.get(STARTER)
        os.environ[STARTER] = str(os.getpid())
        if starter and "LOCAL_RANK" in os.environ and not _is_another(int(starter)):
            self._in_background(self._follow_starter, int(starter))

    def _follow_starter(self, starter: int) -> None:
        while os.getppid() == starter:
            if self.is_watched.wait(LOOK_SECONDS):
                return
        self.because_of(_member(0), _member(os.environ["LOCAL_RANK"]), "ended")

    def follow_started(self, processes: Sequence[subprocess.Popen]) -> None:
        """Ends this process when one of those that it has started ends too early; they are the
        ranks of this host from 1 on."""
        self._in_background(self._follow_started, processes)

    def _follow_started(self, processes: Sequence[subprocess.Popen]) -> None:
        while not self.is_watched.wait(LOOK_SECONDS):
            for local_rank, process in enumerate(processes, 1):
                status = process.poll()
                if status is not None:
                    what = "gone" if status < 0 else "stop" if status else "ended"
                    self.because_of(_member(local_rank), _member(0), what)
                    return

    def _in_background(self, follow, *args) -> None:
        threading.Thread(target=follow, args=args, name="follow", daemon=True).start()


def _is_another(starter: int) -> bool:
    """Whether a process is there that has not started this one, as where it has started torchrun,
    which looks after its ranks itself."""
    if os.getppid() == starter:
        return False
    try:
        os.kill(starter, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _member(local_rank: int | str) -> Member:
    """A rank of this host, as far as it is known before the ranks are joined."""
    node = os.environ.get("NODE_RANK", "0")
    rank = local_rank if node == "0" else f"{local_rank} of node {node}"
    return Member(rank, socket.gethostname())


ENDING = Ending()
"""Of this process."""
