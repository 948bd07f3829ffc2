"""Watches the processes of one run: when one dies, or its host cannot be reached any more, the
others stop with one sentence instead of waiting for it.

Every rank keeps an idle connection to rank 0. When a process dies, its kernel closes the
connection; when a link is cut, the kernel's probes get no answer. Both are noticed while the
interpreter is busy, and a rank that works for long is not mistaken for a dead one.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist

from neighborlm.common.errors import LostRank
from neighborlm.retrieval.cluster.ending import ENDING, Member

MEETING_SECONDS = 600.0
"""Until all ranks have loaded their libraries and met. One that dies on this host meanwhile is
noticed at once, see `ending`; of another host that dies nothing else tells."""
JOINING_SECONDS = 60.0
"""Until all ranks that have met are connected."""
PARTING_SECONDS = 30.0
"""For the others to have done their part as well: what an ended process has sent last may be lost
with its connections."""
KEY = "neighborlm/watch"
"""Under which rank 0 tells the others, in the store of a run, where it listens."""


class RankWatch:
    """Watches the connections between rank 0 and the others from a thread of its own.

    Made by all ranks at the same time.

    Args:
        rank: of this process.
        ranks: how many there are.
        address: under which all ranks reach the host of rank 0; None where all are on one host.
        share: gives every rank the value that rank 0 calls it with.
        seconds: without an answer from a host until it counts as lost.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        address: str | None,
        share: Callable[[Any], Any],
        seconds: int = 30,
    ) -> None:
        self.me = Member(rank, socket.gethostname())
        self.seconds = seconds
        self.share = share  # a group made later uses the same store, which must stay
        self.over = threading.Event()  # all others have ended, or one is lost
        self.links: dict[socket.socket, Member] = {}
        if rank == 0:
            self._listen(ranks, address, share)
        else:
            self._connect(address, share)
        for link in self.links:
            link.settimeout(None)
            self._probe(link)
        ENDING.begin_watch(self)
        threading.Thread(target=self._run, name="rank-watch", daemon=True).start()

    def _listen(self, ranks: int, address: str | None, share: Callable[[Any], Any]) -> None:
        token = secrets.token_hex()
        with _listener(address) as listener:
            share((listener.getsockname()[1], token, self.me.host))
            deadline = time.monotonic() + JOINING_SECONDS
            while len(self.links) < ranks - 1:
                listener.settimeout(max(deadline - time.monotonic(), 0.001))
                link, _ = listener.accept()
                link.settimeout(1.0)  # a stranger may say nothing
                with suppress(OSError):
                    found, *member = link.makefile("rb", 0).readline().decode().split() or [""]
                    if found == token:
                        self.links[link] = Member(int(member[0]), member[1])

    def _connect(self, address: str | None, share: Callable[[Any], Any]) -> None:
        port, token, host = share(None)
        link = socket.create_connection((address or "127.0.0.1", port), JOINING_SECONDS)
        link.sendall(f"{token} {self.me.rank} {self.me.host}\n".encode())
        self.links[link] = Member(0, host)

    def _probe(self, link: socket.socket) -> None:
        """Has the kernel ask for a sign of life, so often that a loss is noticed in time."""
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", max(1, self.seconds // 3)),
            ("TCP_KEEPINTVL", max(1, self.seconds // 6)),
            ("TCP_KEEPCNT", 4),
            ("TCP_USER_TIMEOUT", 1000 * self.seconds),
        ):
            if hasattr(socket, name):  # not on every system
                link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for link in self.links:
                selector.register(link, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    link = key.fileobj
                    word, *who = _received(link).split() or [""]
                    if word == "end":
                        selector.unregister(link)
                        continue
                    member = Member(int(who[0]), who[1]) if who else self.links[link]
                    self._stop(member, gone=word in ("", "gone"))
        self.over.set()

    def _stop(self, other: Member, gone: bool) -> None:
        """Ends this process because of another."""
        self.over.set()
        for link, member in self.links.items():
            if self.me.rank == 0 and member != other:
                _say(link, f"{'gone' if gone else 'stop'} {other.rank} {other.host}")
        ENDING.because_of(other, self.me, "gone" if gone else "stop")

    def leave(self, how: Literal["end", "stop"]) -> None:
        """Tells the others that this process ends, having done its part or because of an error.
        Where it has done its part it waits for the others to end with it."""
        if how == "end" and self.me.rank == 0:  # which says so when all others have
            self.over.wait(PARTING_SECONDS)
        for link in self.links:
            _say(link, how)
        if how == "end" and self.me.rank != 0:
            self.over.wait(PARTING_SECONDS)


def _listener(address: str | None) -> socket.socket:
    """Open to other hosts only where there are any."""
    if address is None:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _received(link: socket.socket) -> str:
    """The line that arrived; empty where the connection is lost."""
    try:
        return link.recv(1024).decode().partition("\n")[0]
    except OSError:
        return ""


def _say(link: socket.socket, line: str) -> None:
    """Sends a line, if the other side is still there."""
    with suppress(OSError):
        link.send(f"{line}\n".encode(), socket.MSG_DONTWAIT)


def watch_from_the_start(
    rank: int, ranks: int, main: tuple[str, int], several_hosts: bool, lost_after: int
) -> None:
    """Has the ranks of this process's run meet and watch one another, once; then a process group
    may be made, which waits half an hour for a rank that has died.

    Args:
        rank: of this process.
        ranks: how many there are.
        main: address and port of rank 0, or of whoever keeps a store for all, as for a group.
        several_hosts: whether there are other hosts.
        lost_after: seconds without an answer from a host until it counts as lost.

    Raises:
        LostRank: they do not come together.
    """
    if ENDING.watch is not None:
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = main[0], str(main[1])
    try:
        within = timedelta(seconds=MEETING_SECONDS)
        store, *_ = next(dist.rendezvous("env://", rank, ranks, timeout=within))

        def share(value: Any) -> Any:
            if rank == 0:
                store.set(KEY, json.dumps(value))
            return json.loads(store.get(KEY))

        RankWatch(rank, ranks, main[0] if several_hosts else None, share, lost_after)
    except (RuntimeError, OSError) as error:  # those of torch.distributed are RuntimeErrors
        reason = " ".join(str(error).split()).split(". ")[0]
        raise LostRank(
            f"rank {rank} on {socket.gethostname()} does not reach the other ranks of {ranks} "
            f"({reason}); the same command goes on from what is on disk"
        ) from error
