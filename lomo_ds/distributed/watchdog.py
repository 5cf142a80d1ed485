"""What ends a job when one of its processes dies: the others know at once, not when a collective times out.

Every rank keeps a TCP connection to rank 0, on which nothing is said while all is well. The kernel closes the
connections of a process however it dies, and TCP's own probes find a host that is gone.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
import time
from selectors import EVENT_READ, DefaultSelector

import torch.distributed as dist

from lomo_ds.distributed.collectives import gather_objects
from lomo_ds.distributed.process_group import is_local_main_process

GOODBYE = b"."  # this rank is done
REPORTED = b"!"  # the user has been told why the job ends
CONNECT_TIMEOUT = 60.0  # seconds
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}  # a host that is gone is missed after 19 seconds
PEER_DIED = 70  # exit status; EX_SOFTWARE of sysexits.h


class Watchdog:
    """Ends this process when another rank's is gone, with a sentence from one of those that are left.

    All ranks make one together, and ``close`` it.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.closed = False
        self.names = gather_objects(f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})")
        self.peers = _connect(self.rank, dist.get_world_size())
        self.wake, self.sleeper = socket.socketpair()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def close(self, reported: bool = False) -> None:
        """Stop watching and being watched.

        Args:
            reported: this rank ends before its work is done and has said why, so that the others must end too.
        """
        self.closed = True
        self._tell(REPORTED if reported else GOODBYE)
        self.wake.close()
        self.thread.join()
        for peer in (*self.peers.values(), self.sleeper):
            peer.close()

    def wait_for_shutdown(self, seconds: float = 3.0) -> None:
        """Let the watch end this process, if the error of a collective is but the echo of a peer's death."""
        if self.peers:
            time.sleep(seconds)

    def _watch(self) -> None:
        with DefaultSelector() as selector:
            selector.register(self.sleeper, EVENT_READ)
            for rank, peer in self.peers.items():
                selector.register(peer, EVENT_READ, rank)
            while not self.closed:
                for key, _ in selector.select():
                    if key.data is None or self.closed:
                        return
                    word = _read(self.peers[key.data])
                    selector.unregister(self.peers[key.data])
                    if word != GOODBYE and not self.closed:
                        self._end(key.data, reported=word == REPORTED)

    def _end(self, lost: int, reported: bool) -> None:
        """Rank 0 hears of every death and tells the others; of its own, rank 1 and the first of each host tell."""
        speaks = self.rank == 0 or (lost == 0 and (self.rank == 1 or is_local_main_process()))
        if speaks and not reported:
            print(
                f"error: {self.names[lost]} has died, and training cannot go on without it; start again with "
                "--resume_from_checkpoint auto to continue from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        self._tell(REPORTED)
        os._exit(PEER_DIED)

    def _tell(self, word: bytes) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(word)


def _connect(rank: int, world_size: int) -> dict[int, socket.socket]:
    """On rank 0 a connection to every other rank, on the others one to rank 0."""
    server = socket.create_server(("", 0), backlog=world_size) if rank == 0 else None
    address = (os.environ["MASTER_ADDR"], server.getsockname()[1]) if server else None
    password = secrets.token_bytes(16)
    address, password = gather_objects((address, password))[0]  # a stranger on the port is not a rank
    assert address is not None
    if server is None:
        peer = socket.create_connection(address, timeout=CONNECT_TIMEOUT)
        peer.sendall(password + rank.to_bytes(4, "big"))
        return {0: _prepare(peer)}
    peers: dict[int, socket.socket] = {}
    with server:
        server.settimeout(CONNECT_TIMEOUT)
        while len(peers) < world_size - 1:
            peer, _ = server.accept()
            peer.settimeout(CONNECT_TIMEOUT)
            greeting = peer.recv(len(password) + 4, socket.MSG_WAITALL)
            if greeting[:-4] == password:
                peers[int.from_bytes(greeting[-4:], "big")] = _prepare(peer)
            else:
                peer.close()
    return peers


def _prepare(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # Linux has all of them
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _read(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""
