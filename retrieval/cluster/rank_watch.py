"""Watches the processes of one run: when one dies, or its host cannot be reached any more, the
others stop with one sentence instead of waiting for it.

Every rank keeps an idle connection to rank 0. When a process dies, its kernel closes the
connection; when a link is cut, the kernel's probes get no answer. Both are noticed while the
interpreter is busy, and a rank that works for long is not mistaken for a dead one.
"""

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, NamedTuple

GRACE_SECONDS = 30.0
"""For the others to end by themselves, when a rank stopped with a message of its own."""
JOINING_SECONDS = 60.0
"""Until all ranks are connected."""
PARTING_SECONDS = 30.0
"""For the others to have done their part as well: what an ended process has sent last may be lost
with its connections."""


class Member(NamedTuple):
    """A rank and the name of its host."""

    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


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
        self.left = False
        self.ending = threading.Lock()  # of this process: one thread says why
        self.reason = ""
        self.is_known = threading.Event()  # that there is a reason
        self.over = threading.Event()  # all others have ended, or one is lost
        self.links: dict[socket.socket, Member] = {}
        if rank == 0:
            self._listen(ranks, address, share)
        else:
            self._connect(address, share)
        for link in self.links:
            link.settimeout(None)
            self._probe(link)
        threading.Thread(target=self._run, name="rank-watch", daemon=True).start()

    def _listen(self, ranks: int, address: str | None, share: Callable[[Any], Any]) -> None:
        token = secrets.token_hex()
        with _listener(address) as listener:
            share((listener.getsockname()[1], token, self.me.host))
            listener.settimeout(JOINING_SECONDS)
            while len(self.links) < ranks - 1:
                link, _ = listener.accept()
                link.settimeout(JOINING_SECONDS)
                found, *member = link.makefile("rb", 0).readline().decode().split() or [""]
                if found == token:  # and not a stranger
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

    def _stop(self, member: Member, gone: bool) -> None:
        """Ends this process because of another."""
        what = "is gone: its process died or its host cannot be reached" if gone else "has stopped"
        self.reason = (
            f"{member} {what}; {self.me} stops too, and the same command goes on from what "
            "is on disk"
        )
        self.is_known.set()
        self.over.set()
        for link, other in self.links.items():
            if self.me.rank == 0 and other != member:
                _say(link, f"{'gone' if gone else 'stop'} {member.rank} {member.host}")
        if not gone:
            time.sleep(GRACE_SECONDS)
        with self.ending:
            if not self.left:
                print(f"error: {self.reason}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait for the other rank in a library

    def leave(self, how: Literal["end", "stop"]) -> None:
        """Tells the others that this process ends, having done its part or because of an error.
        Where it has done its part it waits for the others to end with it."""
        with self.ending:
            self.left = True
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


_watch: RankWatch | None = None
"""Of this process: its ranks stay the same over all stages."""


def watch(*args: Any, **kwargs: Any) -> None:
    """Makes this process's `RankWatch`, once."""
    global _watch
    if _watch is None:
        _watch = RankWatch(*args, **kwargs)


def leave(how: Literal["end", "stop"]) -> None:
    """`RankWatch.leave`, if there is one."""
    if _watch is not None:
        _watch.leave(how)


def reason_to_stop(seconds: float = 2.0) -> str | None:
    """The sentence about another rank that explains a failure of this one, if there is one.

    Args:
        seconds: to wait for it; a library may have noticed first.
    """
    if _watch is not None and _watch.is_known.wait(seconds):
        return _watch.reason
    return None
