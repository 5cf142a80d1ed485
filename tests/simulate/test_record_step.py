"""Recorded steps of the real engine: they ask for what is known of a step."""

from functools import cache

import pytest

from lomo_ds.planner import Machine, Plan, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.simulate import Program
from lomo_ds.simulate.program import HOST

RUN = Settings(sequence=128, gradient_clipping=0.0, gradient_checkpointing=True)
MACHINE = Machine(nvme=3e9)
MODEL = PlannedModel.load("40m")


@cache
def record(settings: Settings) -> tuple[Plan, Program]:
    plan = plan_run(MODEL, settings, MACHINE)
    return plan, record_plan(plan, MODEL)


def total(program: Program, kind: str) -> int:
    return sum(getattr(operation.work, kind) for operation in program.operations if operation.work)


def test_one_gpu_multiplies_what_the_planner_counts_and_copies_nothing() -> None:
    plan, program = record(RUN)
    assert total(program, "flops") == MODEL.trace(RUN, plan.granularity).flops
    assert total(program, "sent") == total(program, "disk") == 0
    assert total(program, "up") + total(program, "down") < 2**16


def test_ranks_send_what_the_planner_counts() -> None:
    plan, program = record(RUN.but(gpus=2))
    assert total(program, "sent") == pytest.approx(plan.time.link_bytes["between GPUs"], rel=0.02)


def test_parameters_in_host_memory_go_up_twice_and_down_once() -> None:
    plan, program = record(RUN.but(offload_param="cpu"))
    assert total(program, "up") == pytest.approx(plan.time.link_bytes["link up"], rel=0.02)
    assert total(program, "down") == pytest.approx(2 * plan.numel, rel=0.02)


def test_checkpoints_of_micro_batches_that_pass_together_go_down_once_and_up_once() -> None:
    plan, program = record(RUN.but(accumulation_steps=2, activation_offload=True))
    assert plan.is_joined
    assert total(program, "down") == pytest.approx(plan.time.link_bytes["link down"], rel=0.02)
    assert total(program, "up") == pytest.approx(plan.time.link_bytes["link up"], rel=0.02)


def test_packed_documents_add_the_work_of_a_mask_and_no_multiplication() -> None:
    _, alone = record(RUN)
    _, packed = record(RUN.but(documents=True))
    assert total(packed, "memory") > total(alone, "memory")
    assert total(packed, "flops") == pytest.approx(total(alone, "flops"), rel=0.1)


def test_the_host_runs_ahead_of_backward() -> None:
    _, program = record(RUN)
    waits = [number for number, operation in enumerate(program.operations) if operation.stream == HOST]
    backward = [number for number, operation in enumerate(program.operations) if operation.in_backward]
    assert backward
    assert [number for number in waits if backward[0] < number < backward[-1]] == []
