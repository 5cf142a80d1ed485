"""Planned seconds: those of the timeline of the real engine, on machines on which different parts are slow."""

from typing import Any

import pytest

from lomo_ds.models.presets import preset_config
from lomo_ds.planner import Machine, PlannedModel, Settings, plan_run
from lomo_ds.planner.simulated_step import record_plan
from lomo_ds.planner.step_time import COMPUTE, GPU_TO_HOST, HOST_TO_GPU, LAUNCHES
from lomo_ds.simulate import Lane, run_program

RUN = Settings(sequence=1024, gradient_clipping=0.0, gradient_checkpointing=True)
MACHINES = {
    "RTX 3090": Machine(),
    "a slow host": Machine(launch_seconds=400e-6),
    "H100": Machine(pcie=50e9, gpu_link=350e9, flops=989e12, memory_bandwidth=3.35e12),
}
CLIPPED = {"gradient_clipping": 1.0}
KINDS = {Lane.COMPUTE: COMPUTE, Lane.LINK_UP: HOST_TO_GPU, Lane.LINK_DOWN: GPU_TO_HOST, Lane.HOST: LAUNCHES}


@pytest.mark.parametrize(
    ("name", "layers", "changes"),
    [
        ("350m", 24, {}),
        ("7b", 6, {"gpus": 8}),
        ("7b", 6, {"offload_param": "cpu"}),
        ("7b", 6, {"offload_param": "cpu", "gpus": 8, "accumulation_steps": 3, "accumulation": "layered"}),
        ("1b", 8, {"gpus": 8, "weights": "int8", "offload_param": "cpu"}),
        ("1b", 8, {"gpus": 8, "update_schedule": "two_pass", **CLIPPED}),
        ("1b", 8, {"gpus": 2, "update_schedule": "stash", "stash_device": "cpu", **CLIPPED}),
        ("1b", 8, {"accumulation_steps": 3, "accumulation": "stash", "offload_param": "cpu"}),
    ],
)
def test_planned_seconds_are_those_of_the_timeline(name: str, layers: int, changes: dict[str, Any]) -> None:
    model = PlannedModel(preset_config(name, num_hidden_layers=layers), name)
    settings = RUN.but(**changes)
    program = record_plan(plan_run(model, settings, MACHINES["RTX 3090"]), model)
    for machine in MACHINES.values():
        plan, timeline = plan_run(model, settings, machine), run_program(program, machine)
        assert plan.time.total == pytest.approx(timeline.seconds, rel=0.10)
        busy = {lane: timeline.busy(lane) for lane in Lane}
        busy[Lane.HOST] = sum(operation.work is not None for operation in program.operations) * machine.launch_seconds
        for lane, kind in KINDS.items():
            assert plan.time.by_kind[kind] == pytest.approx(busy[lane], rel=0.03, abs=0.01 * timeline.seconds)
