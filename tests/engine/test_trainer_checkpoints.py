"""Checkpoints of transformers' Trainer: resuming is bit-exact, and the best one is loaded at the end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ranks import Ranks
from tests.trainers import (
    STEPS,
    logged,
    lomo_installed,
    shuffled_trainer,
)

GroupOf = Callable[..., Ranks]


def run_and_resume(folder: str, output_dir: str, world_size: int, bf16: bool) -> list[tuple[float, float]]:
    """Train with a checkpoint after two steps, and again from that checkpoint; both save their model."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    with lomo_installed():
        whole = shuffled_trainer(folder, f"{output_dir}/whole", world_size, bf16=bf16, **saving)
        whole.train()
        whole.save_model(f"{output_dir}/expected")
    with lomo_installed():
        torch.manual_seed(99)
        resumed = shuffled_trainer(folder, f"{output_dir}/resumed", world_size, bf16=bf16)
        resumed.train(resume_from_checkpoint=f"{output_dir}/whole/checkpoint-2")
        resumed.save_model(f"{output_dir}/resumed")
    assert logged(resumed) == logged(whole)
    return logged(resumed)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_is_bit_exact(ranks: GroupOf, assets: Path, tmp_path: Path, world_size: int, bf16: bool) -> None:
    """In bf16 weights are rounded stochastically, from where the noise of the first run ended."""
    records = ranks(world_size).run(run_and_resume, str(assets), str(tmp_path), world_size, bf16)[0]
    assert len(records) == STEPS
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "resumed"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16 if bf16 else torch.float32}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def run_with_best_model(folder: str, output_dir: str, world_size: int) -> dict[str, Any]:
    """Choose the model with the largest loss, which is the one after the first step."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    with lomo_installed():
        trainer = shuffled_trainer(folder, output_dir, world_size, save_total_limit=2, **best, **saving)
        trainer.train()
        trainer.save_model(f"{output_dir}/best")
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        best_loss = trainer.evaluate()["eval_loss"]
        return {"best": trainer.state.best_model_checkpoint, "loss": best_loss, "losses": losses}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_are_deleted(
    ranks: GroupOf, assets: Path, tmp_path: Path, world_size: int
) -> None:
    result = ranks(world_size).run(run_with_best_model, str(assets), str(tmp_path), world_size)[0]
    assert result["best"] == f"{tmp_path}/checkpoint-1"
    assert result["loss"] == result["losses"][0] > max(result["losses"][1:])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    best, loaded = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-1", "best"))
    assert all(torch.equal(best[name], loaded[name]) for name in best)
