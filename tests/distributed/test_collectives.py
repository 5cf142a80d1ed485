"""Tests of the collectives, of errors on some ranks, and of the process group."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lomo_ds.distributed import process_group
from lomo_ds.distributed.collectives import all_reduce_min, all_reduce_sum, raise_on_all_ranks
from lomo_ds.errors import ConfigError, PeerError
from tests.engines import make_engine
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


def sum_and_least() -> tuple[float, float]:
    own = torch.tensor([float(dist.get_rank() + 1)])
    return all_reduce_sum(own.clone(), dist.get_world_group()).item(), all_reduce_min(
        own.clone(), dist.get_world_group()
    ).item()


def test_all_reduce_sum_and_min(ranks: GroupOf) -> None:
    assert ranks(3).run(sum_and_least) == [(6.0, 1.0)] * 3


def fail_on(failing: list[int]) -> str:
    def action() -> int:
        if dist.get_rank() in failing:
            raise ConfigError(f"rank {dist.get_rank()} knows")
        return dist.get_rank()

    try:
        return str(raise_on_all_ranks(action))
    except (ConfigError, PeerError) as error:
        return f"{type(error).__name__} {error} {error.only_on_this_rank}"


def test_one_rank_reports_an_error(ranks: GroupOf) -> None:
    assert ranks(3).run(fail_on, []) == ["0", "1", "2"]
    silent = "PeerError rank 1 knows False"
    assert ranks(3).run(fail_on, [1, 2]) == [silent, "ConfigError rank 1 knows True", silent]


def test_slurm_variables_are_translated_for_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name, value in {
        "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_JOB_ID": "123456", "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    scontrol = f"{tmp_path}/scontrol"
    with open(scontrol, "w") as script:  # noqa: PTH123
        script.write('#!/bin/sh\ntest "$*" = "show hostnames gpu[03-04]" && printf "gpu03\\ngpu04\\n"\n')
    os.chmod(scontrol, 0o755)  # noqa: PTH101
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert process_group._slurm_environment() == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "23456",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "device_type", "device", "main"),
    [(1, "cuda", 0, False), (4, "cuda", 3, False), (1, "cpu", 3, False)],
    ids=["one GPU for each task", "all GPUs of the host", "cpu"],
)
def test_a_task_that_sees_one_device_uses_it(
    monkeypatch: pytest.MonkeyPatch, visible: int, device_type: str, device: int, main: bool
) -> None:
    chosen: list[int] = []
    accelerator = SimpleNamespace(
        device_name=lambda: device_type,
        device_count=lambda: visible,
        set_device=chosen.append,
        communication_backend_name=lambda: "gloo",
        create_op_builder=lambda name: None,
    )
    for name, value in {"RANK": "7", "LOCAL_RANK": "3", process_group.RANK_ON_HOST: ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_distributed", lambda **options: None)
    assert process_group.start_process_group()
    assert chosen == [device]
    assert os.environ["LOCAL_RANK"] == str(device), "DeepSpeed takes it for the number of the device"
    assert process_group.is_local_main_process() is main


class Collectives(TorchDispatchMode):
    """Counts the collectives by name and process group."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            groups = [argument for argument in args if isinstance(argument, torch.ScriptObject)]
            names = {torch.distributed.ProcessGroup.unbox(group).group_name for group in groups[:1]}
            self.counted[func._opname, *names] += 1
        return func(*args, **(kwargs or {}))


def collectives_of_one_rank(folder: str, zero: dict[str, Any]) -> Counter[str]:
    """Count the collectives of building an engine, training and saving on one rank."""
    with Collectives() as collectives:
        engine = make_engine(tiny_model(), "stash", global_norm=1.0, zero_optimization={"stage": 3, **zero})
        for number in range(3):
            engine.train_batch(whole_batch(number, rows=2))
        engine.save_checkpoint(folder)
    of_checkpoints = engine.saver.group.group_name
    return Counter({name: count for (name, group), count in collectives.counted.items() if group != of_checkpoints})


def test_one_rank_calls_no_collective(ranks: GroupOf, tmp_path: Path) -> None:
    assert ranks(1).run(collectives_of_one_rank, str(tmp_path), {}) == [Counter()]


def test_one_rank_calls_the_collectives_that_compare_deepspeeds_traces(ranks: GroupOf, tmp_path: Path) -> None:
    """With offloaded parameters, the order of modules is traced in two forwards and compared with rank 0's."""
    offload = {"offload_param": {"device": "cpu"}}
    assert ranks(1).run(collectives_of_one_rank, str(tmp_path), offload) == [Counter({"broadcast_": 8})]
