"""TRL's DPOTrainer with one line more: LOMO trains the policy, and the reference model stays with DeepSpeed."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from tests.ranks import Ranks
from tests.trainers import (
    BATCH,
    COMMON,
    LEARNING_RATE,
    STEPS,
    TOLERANCE,
    batch_sizes,
    ds_config,
    instruction_rows,
    largest_difference,
    logged,
    lomo_installed,
    stories_model,
    stories_tokenizer,
    train_plainly,
)

GroupOf = Callable[..., Ranks]
BETA = 0.1


def run_dpo(folder: str, output_dir: str, world_size: int) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    with lomo_installed():
        sizes = batch_sizes(world_size)
        args = DPOConfig(output_dir, **COMMON | sizes, deepspeed=ds_config(), beta=BETA, bf16=False, max_length=64)
        rows = instruction_rows(folder, STEPS * BATCH + 1).to_list()
        pairs = [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": following["completion"]}
            for row, following in itertools.pairwise(rows)
        ]
        trainer = DPOTrainer(
            stories_model(folder),
            stories_model(folder),
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=stories_tokenizer(folder),
        )
        trainer.train()
        return {
            "engines": (type(trainer.model_wrapped).__name__, type(trainer.ref_model).__name__),
            "logged": logged(trainer),
            "rows": trainer.train_dataset.to_list(),
        }


def answer_log_probabilities(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each chosen and of each rejected answer; a batch has the chosen ones first."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    of_tokens = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    chosen, rejected = (of_tokens * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
    return chosen, rejected


@pytest.mark.parametrize("world_size", [1, 2])
def test_dpo_trainer_takes_the_steps_of_plain_sgd(
    ranks: GroupOf, assets: Path, tmp_path: Path, one_thread: None, world_size: int
) -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    results = ranks(world_size).run(run_dpo, str(assets), str(tmp_path), world_size)
    frozen = stories_model(str(assets)).requires_grad_(False)

    def loss_of(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
        chosen, rejected = answer_log_probabilities(model, batch)
        with torch.no_grad():
            chosen_before, rejected_before = answer_log_probabilities(frozen, batch)
        return -logsigmoid(BETA * ((chosen - chosen_before) - (rejected - rejected_before))).mean()

    collate = DataCollatorForPreference(pad_token_id=0, max_length=64)
    rates = [LEARNING_RATE] * STEPS
    expected = train_plainly(stories_model(str(assets)), results[0]["rows"], collate, BATCH, rates, loss_of=loss_of)
    for result in results:
        assert result["engines"] == ("LomoEngine", "DeepSpeedEngine")
        assert largest_difference(result["logged"], expected) < TOLERANCE
