"""A training loop with Accelerate: it averages as on DeepSpeed, saves and loads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from tests.ranks import Ranks
from tests.trainers import (
    ACCUMULATION,
    BATCH,
    LEARNING_RATE,
    STEPS,
    TOLERANCE,
    ds_config,
    lomo_installed,
    stories_model,
    stories_tokenizer,
    tokenized_rows,
)

GroupOf = Callable[..., Ranks]


def run_accelerate(folder: str, output_dir: str, world_size: int) -> dict[str, Any]:
    """Train by a loop of one's own, save, and load again."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, DummyOptim

    with lomo_installed():
        PartialState(cpu=True)
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config(gradient_accumulation_steps=ACCUMULATION))
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATION)
        collate = DataCollatorForSeq2Seq(stories_tokenizer(folder))
        batch_size = BATCH // ACCUMULATION // world_size
        loader: Any = torch.utils.data.DataLoader(
            tokenized_rows(folder, STEPS * BATCH), batch_size=batch_size, collate_fn=collate
        )
        model: Any = stories_model(folder)
        model, optimizer, loader = accelerator.prepare(model, DummyOptim(model.parameters(), lr=LEARNING_RATE), loader)
        norms = []
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    norms.append(model.get_global_grad_norm())
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_model(model, f"{output_dir}/model")
        accelerator.save_state(f"{output_dir}/state")
        model.global_steps = 0
        accelerator.load_state(f"{output_dir}/state")
        return {"norms": norms, "steps": model.global_steps}


def train_by_means_of_means(folder: str, batch_size: int) -> tuple[list[float], PreTrainedModel]:
    """Train plainly on the mean of the losses of ``batch_size`` rows at a time, and return the gradient norms."""
    model, rows = stories_model(folder).train(), tokenized_rows(folder, STEPS * BATCH)
    collate = DataCollatorForSeq2Seq(stories_tokenizer(folder))
    norms = []
    for first in range(0, STEPS * BATCH, BATCH):
        for start in range(first, first + BATCH, batch_size):
            batch = collate([rows[index] for index in range(start, start + batch_size)])
            (model(**batch, use_cache=False).loss * batch_size / BATCH).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
        model.zero_grad()
    return norms, model


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_with_accelerate_averages_as_deepspeed_does(
    ranks: GroupOf, assets: Path, tmp_path: Path, one_thread: None, world_size: int
) -> None:
    results = ranks(world_size).run(run_accelerate, str(assets), str(tmp_path), world_size)
    norms, model = train_by_means_of_means(str(assets), BATCH // ACCUMULATION // world_size)
    for result in results:
        assert result["norms"] == pytest.approx(norms, rel=TOLERANCE)
        assert result["steps"] == STEPS
    assert (tmp_path / "state" / "pytorch_model" / "state.json").is_file()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    weights = dict(model.named_parameters())
    assert max(float((weights[name] - saved[name]).detach().abs().max()) for name in weights) < TOLERANCE
