"""Recorded steps of the real engine: they ask for what is known of a step."""

import pytest

from lomo_ds.planner import Machine, Plan, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.simulate import Program

RUN = Settings(sequence=128, gradient_clipping=0.0, gradient_checkpointing=True)
MACHINE = Machine(nvme=3e9)
MODEL = PlannedModel.load("40m")


def record(settings: Settings) -> tuple[Plan, Program]:
    plan = plan_run(MODEL, settings, MACHINE)
    return plan, record_plan(plan, MODEL)


def total(program: Program, kind: str) -> int:
    return sum(getattr(operation.work, kind) for operation in program.operations if operation.work)


def test_one_gpu_multiplies_what_the_planner_counts_and_copies_nothing() -> None:
    plan, program = record(RUN)
    assert total(program, "flops") == pytest.approx(plan.time.by_kind["compute"] * MACHINE.flops * MACHINE.utilisation)
    assert total(program, "sent") == total(program, "disk") == 0
    assert total(program, "up") + total(program, "down") < 2**16


def test_ranks_send_what_the_planner_counts() -> None:
    plan, program = record(RUN.but(gpus=2))
    assert total(program, "sent") == pytest.approx(plan.time.link_bytes["between GPUs"], rel=0.02)


def test_parameters_in_host_memory_go_up_twice_and_down_once() -> None:
    plan, program = record(RUN.but(offload_param="cpu"))
    assert total(program, "up") == pytest.approx(plan.time.link_bytes["link up"], rel=0.02)
    assert total(program, "down") == pytest.approx(2 * plan.numel, rel=0.02)
