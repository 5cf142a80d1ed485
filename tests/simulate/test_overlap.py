"""Tests of what overlaps in a step: timelines of real steps on machines whose arithmetic or whose links are slow."""

from functools import cache

import pytest

from lomo_ds.models.presets import preset_config
from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.simulate import Lane, Operation, Program, Span, Timeline, find_stalls, run_program
from lomo_ds.simulate.program import HOST

LAYERS = 10
MODEL = PlannedModel(preset_config("7b", num_hidden_layers=LAYERS), "7b")
RUN = Settings(gradient_clipping=0.0, gradient_checkpointing=True)
HOST_MEMORY = RUN.but(offload_param="cpu")
EIGHT_RANKS = RUN.but(gpus=8, batch=4)
SLOW_LINK, FAST_LINK = 1.5e9, 40e9  # bytes per second
# Once in a step: labels are counted, masks left out, the loss and the norm reduced, and gathered copies refreshed
WAITS_OF_A_STEP = {
    "lomo_ds/engine/items.py",
    "lomo_ds/engine/step_batch.py",
    "lomo_ds/engine/optimizer.py",
    "lomo_ds/engine/base.py",
    "lomo_ds/zero3/gathering.py",
    "transformers/masking_utils.py",
}


def machine(link: float) -> Machine:
    return Machine(pcie=link, gpu_link=link)


@cache
def record(settings: Settings) -> Program:
    """The program does not depend on the speed of the machine."""
    return record_plan(plan_run(MODEL, settings, machine(FAST_LINK)), MODEL)


def run(settings: Settings, link: float) -> Timeline:
    return run_program(record(settings), machine(link))


def operation_of(timeline: Timeline, span: Span) -> Operation:
    return timeline.program.operations[span.operation]


def busy_share(timeline: Timeline, lane: Lane, start: float, end: float) -> float:
    spans = timeline.spans_of(lane)
    return sum(max(0.0, min(span.end, end) - max(span.start, start)) for span in spans) / (end - start)


def backward_start(timeline: Timeline) -> float:
    return next(span.start for span in timeline.spans if operation_of(timeline, span).name == "attention backward")


def first_and_last(timeline: Timeline, lane: Lane) -> tuple[float, float]:
    spans = [span for span in timeline.spans_of(lane) if span.end - span.start > 0.001]
    return spans[0].start, spans[-1].end


def test_where_arithmetic_bounds_parameters_in_host_memory_cost_nothing() -> None:
    timeline = run(HOST_MEMORY.but(batch=8), FAST_LINK)
    assert timeline.busy_share(Lane.COMPUTE) >= 0.95


def test_where_the_link_bounds_it_is_always_busy() -> None:
    """Up in forward; in backward down as well, where the last copies are those of the last updates."""
    timeline = run(HOST_MEMORY, SLOW_LINK)
    up, down = first_and_last(timeline, Lane.LINK_UP), first_and_last(timeline, Lane.LINK_DOWN)
    assert busy_share(timeline, Lane.LINK_UP, *up) >= 0.95
    assert busy_share(timeline, Lane.LINK_DOWN, backward_start(timeline), down[1]) >= 0.95
    assert down[1] >= timeline.seconds - 0.01


def test_backward_waits_for_earlier_updates_on_their_way_home_never_for_the_latest() -> None:
    timeline = run(HOST_MEMORY, SLOW_LINK)
    operations = timeline.program.operations
    home = [number for number, operation in enumerate(operations) if operation.work and operation.work.down > 2**20]
    last_gradient = max(n for n, operation in enumerate(operations) if operation.name == "update")
    for number, operation in enumerate(operations[:last_gradient]):
        for wait in operation.waits:
            if wait.operation in home and operation.stream == 0:
                assert max(copy for copy in home if copy < number) > wait.operation, operation.source


def test_a_module_waits_for_its_own_parameters_not_for_those_of_the_next_layer() -> None:
    """The copy of the next layer has been requested, and goes on, when a layer begins."""
    operations = record(HOST_MEMORY).operations
    fetched = [number for number, operation in enumerate(operations) if operation.work and operation.work.up > 2**20]
    waits = [
        (number, max(wait.operation for wait in operation.waits if wait.operation in fetched))
        for number, operation in enumerate(operations)
        if operation.stream == 0 and any(wait.operation in fetched for wait in operation.waits)
    ]
    assert len(waits) >= 1.5 * LAYERS, "those at the end of forward are kept for backward"
    ahead = [any(awaited < copy < number for copy in fetched) for number, awaited in waits[:-2]]
    assert sum(ahead) >= 0.8 * len(ahead), "all but at the end of a pass, where there is no next layer"


@pytest.mark.parametrize("settings", [RUN, HOST_MEMORY, EIGHT_RANKS], ids=["one GPU", "host memory", "eight ranks"])
def test_the_host_never_waits_inside_a_layer(settings: Settings) -> None:
    operations = record(settings).operations
    waits = [operation for operation in operations if operation.stream == HOST and operation.waits]
    between_layers = [wait for wait in waits if wait.source.startswith("lomo_ds/zero3/transport.py")]
    others = {wait.source.partition(":")[0] for wait in waits} - {"lomo_ds/zero3/transport.py"}
    assert others <= WAITS_OF_A_STEP
    assert len(between_layers) <= 2 * (LAYERS + 3), "one for each gather of a layer at most"


def test_reductions_are_hidden_but_for_those_of_the_last_layer() -> None:
    timeline = run(EIGHT_RANKS, FAST_LINK)
    end_of_layers = max(span.end for span in timeline.spans if "attention" in operation_of(timeline, span).name)
    stalls = find_stalls(timeline, Lane.COMPUTE)
    exposed = [stall for stall in stalls if "reduce-scatter" in stall.reason and stall.start < end_of_layers]
    assert sum(stall.seconds for stall in exposed) <= 0.01 * timeline.seconds
    assert timeline.busy_share(Lane.COMPUTE) >= 0.95


def test_a_slow_wire_is_busy_in_backward() -> None:
    timeline = run(EIGHT_RANKS, SLOW_LINK)
    assert busy_share(timeline, Lane.WIRE, backward_start(timeline), first_and_last(timeline, Lane.WIRE)[1]) >= 0.95


def test_the_sums_of_a_layer_are_reduced_while_the_next_one_runs() -> None:
    timeline = run(RUN.but(gpus=8, accumulation_steps=4), 12e9)
    end_of_layers = max(span.end for span in timeline.spans if "attention" in operation_of(timeline, span).name)
    start = backward_start(timeline)
    assert busy_share(timeline, Lane.COMPUTE, start, end_of_layers) >= 0.95
