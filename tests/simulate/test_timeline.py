"""The virtual clock: when the operations of a small program run on a machine with round figures."""

import pytest

from lomo_ds.simulate import Lane, Machine, Timeline, Work, find_stalls, longest_stalls, run_program
from lomo_ds.simulate.machine import COLLECTIVE_SECONDS, COPY_SECONDS
from lomo_ds.simulate.streams import SimulatedStream, Streams

LAUNCH = 0.001
SECOND = Work(flops=100)
MACHINE = Machine(flops=100, utilisation=1.0, memory_bandwidth=10, pcie=10, launch_seconds=LAUNCH)


def seconds_up(seconds: float) -> Work:
    return Work(up=round(10 * seconds))


def run(streams: Streams, machine: Machine = MACHINE) -> Timeline:
    return run_program(streams.program, machine)


def names(timeline: Timeline, lane: Lane) -> list[str]:
    return [timeline.program.operations[span.operation].name for span in timeline.spans_of(lane)]


def test_kernels_of_a_stream_run_one_after_the_other() -> None:
    streams = Streams()
    streams.compute.add("one", SECOND)
    streams.compute.add("two", Work(memory=20))
    timeline = run(streams)
    assert [span.start for span in timeline.spans] == pytest.approx([LAUNCH, LAUNCH + 1])
    assert timeline.seconds == pytest.approx(LAUNCH + 3)


def test_a_kernel_takes_the_longer_of_arithmetic_and_memory() -> None:
    assert MACHINE.kernel_seconds(flops=100, memory=5) == 1.0
    assert MACHINE.kernel_seconds(flops=100, memory=50) == 5.0


def test_a_copy_in_another_stream_overlaps_with_kernels() -> None:
    streams = Streams()
    copies = SimulatedStream(streams, "copies")
    streams.compute.add("kernel", SECOND)
    copies.add("copy", seconds_up(1))
    timeline = run(streams)
    assert timeline.seconds == pytest.approx(1 + 2 * LAUNCH + COPY_SECONDS)
    assert timeline.busy(Lane.LINK_UP) == pytest.approx(1 + COPY_SECONDS)


def test_a_stream_that_waits_for_an_event_begins_when_it_happens() -> None:
    streams = Streams()
    copies = SimulatedStream(streams, "copies")
    copies.add("copy", seconds_up(2))
    arrived = copies.record_event()
    copies.add("later copy", seconds_up(1))
    streams.compute.wait_event(arrived)
    streams.compute.add("kernel", SECOND)
    timeline = run(streams)
    assert timeline.spans[2].start == pytest.approx(timeline.spans[0].end)
    assert timeline.spans[2].start < timeline.spans[1].end


def test_waiting_for_a_stream_is_waiting_for_all_it_has_been_given_so_far() -> None:
    streams = Streams()
    copies = SimulatedStream(streams, "copies")
    copies.add("copy", seconds_up(1))
    streams.compute.wait_stream(copies)
    copies.add("later copy", seconds_up(5))
    streams.compute.add("kernel", SECOND)
    timeline = run(streams)
    assert timeline.spans[2].start == pytest.approx(timeline.spans[0].end)


def test_an_event_of_an_earlier_step_has_happened() -> None:
    streams = Streams()
    streams.compute.add("kernel", SECOND)
    event = streams.compute.record_event()
    streams.begin_program()
    streams.compute.wait_event(event)
    streams.compute.add("kernel", SECOND)
    assert streams.program.operations[0].waits == ()


def test_a_lane_goes_to_the_operation_that_was_ready_first() -> None:
    streams = Streams()
    early, late = SimulatedStream(streams, "early"), SimulatedStream(streams, "late")
    streams.compute.add("kernel", SECOND)
    late.wait_stream(streams.compute)
    late.add("late", seconds_up(1))  # given out first, ready when the kernel has ended
    early.add("early", seconds_up(1))
    assert names(run(streams), Lane.LINK_UP) == ["early", "late"]


def test_the_host_gives_out_nothing_while_it_waits() -> None:
    streams = Streams()
    streams.compute.add("kernel", SECOND)
    streams.compute.synchronize()
    streams.compute.add("late", SECOND)
    timeline = run(streams)
    assert timeline.spans[2].issued == pytest.approx(timeline.spans[0].end + LAUNCH)
    assert timeline.busy(Lane.HOST) == pytest.approx(timeline.seconds - 1, abs=2 * LAUNCH)


@pytest.mark.parametrize(("gpu_link", "lanes"), [(0.0, {Lane.WIRE, Lane.LINK_UP, Lane.LINK_DOWN}), (20.0, {Lane.WIRE})])
def test_gpus_without_a_link_of_their_own_share_that_to_the_host(gpu_link: float, lanes: set[Lane]) -> None:
    streams = Streams()
    SimulatedStream(streams, "NCCL").add("all-gather", Work(sent=40))
    machine = Machine(pcie=10, gpu_link=gpu_link, launch_seconds=LAUNCH)
    timeline = run(streams, machine)
    assert set(timeline.spans[0].lanes) == lanes
    assert timeline.seconds == pytest.approx(LAUNCH + COLLECTIVE_SECONDS + 40 / (gpu_link or 10))


def test_a_stall_names_the_wait_that_causes_it() -> None:
    streams = Streams()
    copies = SimulatedStream(streams, "copies")
    for _ in range(2):
        copies.add("copy", seconds_up(3))
        streams.compute.wait_stream(copies)
        streams.compute.add("kernel", SECOND)
    (longest,) = longest_stalls(run(streams), Lane.COMPUTE)
    assert (longest.reason, longest.count) == ("kernel waits for copy", 2)
    assert longest.seconds == pytest.approx(3 + 2, abs=0.01)


def test_a_stall_names_the_line_in_which_the_host_waits() -> None:
    streams = Streams()
    copies = SimulatedStream(streams, "copies")
    copies.add("copy", seconds_up(3))
    copies.synchronize()
    streams.compute.add("kernel", SECOND)
    (stall,) = find_stalls(run(streams), Lane.COMPUTE)
    assert stall.reason == "the host waits in stream.synchronize"
    (wait,) = find_stalls(run(streams), Lane.HOST)
    assert wait.reason == "stream.synchronize for copy"


def test_a_stall_of_a_host_that_launches_too_slowly_is_its_own() -> None:
    streams = Streams()
    for _ in range(3):
        streams.compute.add("kernel", Work(flops=1))
    timeline = run(streams, Machine(flops=100, utilisation=1.0, launch_seconds=1.0))
    assert {stall.reason for stall in find_stalls(timeline, Lane.COMPUTE)} == {"the host is late"}
