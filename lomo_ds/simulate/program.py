"""A recorded step: all that the engine has asked of its GPU and of its links, in the order in which the host asked.

A program does not depend on the speed of a machine. ``timeline`` says when each operation runs on a given one.
"""

from dataclasses import dataclass, field

HOST = -1  # number of the stream of the host itself


@dataclass(frozen=True, slots=True)
class Work:
    """The demands of an operation on a machine.

    Attributes:
        flops: floating-point operations of matrix products and attention.
        memory: bytes that a kernel reads and writes in GPU memory.
        up, down: bytes copied from host to GPU, and from GPU to host.
        sent: bytes that this rank sends to its peers, and as many that it receives.
        disk: bytes that all ranks of a host read from its drive, or write to it, together.
    """

    flops: int = 0
    memory: int = 0
    up: int = 0
    down: int = 0
    sent: int = 0
    disk: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """A wait for the end of an operation.

    Attributes:
        operation: its number.
        source: file and line of the code that asked for the wait.
    """

    operation: int
    source: str


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. It begins after all earlier ones of its stream have ended.

    Attributes:
        name: of the kernel, copy or collective.
        stream: number of its stream; ``HOST`` for what the host does itself.
        work: what it asks of the machine; None if it only waits.
        waits: for operations of other streams, before this one begins.
        source: file and line of the code that asked for it.
        in_backward: whether autograd has asked for it, directly or through a hook.
    """

    name: str
    stream: int
    work: Work | None
    waits: tuple[Wait, ...]
    source: str
    in_backward: bool = False


@dataclass
class Program:
    """The operations of a step, by number, and the names of the streams."""

    operations: list[Operation] = field(default_factory=list)
    streams: list[str] = field(default_factory=list)
