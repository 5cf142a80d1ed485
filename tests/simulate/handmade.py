"""A small program on a machine with round figures, for tests of what is said about a timeline."""

from lomo_ds.simulate import Machine, Timeline, Work, run_program
from lomo_ds.simulate.streams import SimulatedStream, Streams

MACHINE = Machine(flops=100, utilisation=1.0, memory_bandwidth=10, pcie=10, gpu_link=10, launch_seconds=0.001)


def copies_and_kernels() -> Timeline:
    """Return a timeline in which each kernel of a second waits for a copy of three, and the host waits at the end."""
    streams = Streams()
    copies = SimulatedStream(streams, "copies")
    for _ in range(2):
        copies.add("copy up", Work(up=30))
        streams.compute.wait_stream(copies)
        streams.compute.add("mm", Work(flops=100))
    streams.compute.synchronize()
    SimulatedStream(streams, "NCCL").add("all-gather", Work(sent=20))
    return run_program(streams.program, MACHINE)
