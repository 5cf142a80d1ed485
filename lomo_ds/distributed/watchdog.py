"""Watchdog that stops all ranks as soon as one dies, instead of when a collective times out.

Every rank keeps an idle TCP connection to rank 0. The kernel closes the connections of a process however it dies, and
TCP keepalive probes detect a lost host.
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

GOODBYE = b"."  # this rank has finished
REPORTED = b"!"  # the error has already been reported to the user
CONNECT_TIMEOUT = 60.0  # seconds
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}  # a lost host is detected after 19 seconds
PEER_DIED = 70  # exit status; EX_SOFTWARE of sysexits.h


class Watchdog:
    """Ends this process when the process of another rank has died; one of the remaining ranks reports it.

    All ranks must create one at the same time, and ``close`` it.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.closed = False
        self.names = gather_objects(f"rank {self.rank} (process {os.getpid()} on {socket.gethostname()})")
        self.peers = _connect(self.rank, dist.get_world_size())
        self.wake, self.waiter = socket.socketpair()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()

    def close(self, reported: bool = False) -> None:
        """Stop watching and being watched.

        Args:
            reported: this rank has failed and has reported its error, so the other ranks must end too.
        """
        self.closed = True
        self._send(REPORTED if reported else GOODBYE)
        self.wake.close()
        self.thread.join()
        for peer in (*self.peers.values(), self.waiter):
            peer.close()

    def wait_for_shutdown(self, seconds: float = 3.0) -> None:
        """Give the watchdog time to end this process, in case a collective failed only because a peer died."""
        if self.peers:
            time.sleep(seconds)

    def _watch(self) -> None:
        with DefaultSelector() as selector:
            selector.register(self.waiter, EVENT_READ)
            for rank, peer in self.peers.items():
                selector.register(peer, EVENT_READ, rank)
            while not self.closed:
                for key, _ in selector.select():
                    if key.data is None or self.closed:
                        return
                    message = _read(self.peers[key.data])
                    selector.unregister(self.peers[key.data])
                    if message != GOODBYE and not self.closed:
                        self._end_process(key.data, reported=message == REPORTED)

    def _end_process(self, lost: int, reported: bool) -> None:
        """Report the death of rank ``lost`` once, notify the other ranks, and end this process.

        Rank 0 detects and reports every death. Its own is reported by rank 1 and by the first rank of each host.
        """
        reports = self.rank == 0 or (lost == 0 and (self.rank == 1 or is_local_main_process()))
        if reports and not reported:
            print(
                f"error: {self.names[lost]} has died, and training cannot go on without it; start again with "
                "--resume_from_checkpoint auto to continue from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        self._send(REPORTED)
        os._exit(PEER_DIED)

    def _send(self, message: bytes) -> None:
        for peer in self.peers.values():
            with contextlib.suppress(OSError):
                peer.sendall(message)


def _connect(rank: int, world_size: int) -> dict[int, socket.socket]:
    """Return the connections by rank: on rank 0 to every other rank, on the others to rank 0."""
    server = socket.create_server(("", 0), backlog=world_size) if rank == 0 else None
    address = (os.environ["MASTER_ADDR"], server.getsockname()[1]) if server else None
    token = secrets.token_bytes(16)  # rank 0 rejects connections that do not send it
    address, token = gather_objects((address, token))[0]
    assert address is not None
    if server is None:
        peer = socket.create_connection(address, timeout=CONNECT_TIMEOUT)
        peer.sendall(token + rank.to_bytes(4, "big"))
        return {0: _prepare(peer)}
    peers: dict[int, socket.socket] = {}
    with server:
        server.settimeout(CONNECT_TIMEOUT)
        while len(peers) < world_size - 1:
            peer, _ = server.accept()
            peer.settimeout(CONNECT_TIMEOUT)
            hello = peer.recv(len(token) + 4, socket.MSG_WAITALL)
            if hello[:-4] == token:
                peers[int.from_bytes(hello[-4:], "big")] = _prepare(peer)
            else:
                peer.close()
    return peers


def _prepare(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux has all three
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer


def _read(peer: socket.socket) -> bytes:
    try:
        return peer.recv(1)
    except OSError:
        return b""
