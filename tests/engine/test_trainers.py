"""transformers' Trainer with one line more: it takes the steps of plain SGD, evaluates, generates and saves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tests.ranks import Ranks
from tests.trainers import (
    BATCH,
    COMMON,
    LEARNING_RATE,
    STEPS,
    TOLERANCE,
    batch_sizes,
    ds_config,
    largest_difference,
    logged,
    lomo_installed,
    stories_model,
    stories_tokenizer,
    tokenized_rows,
    train_plainly,
    weight_difference,
)

GroupOf = Callable[..., Ranks]
ROWS = STEPS * BATCH - 4  # the last step of the epoch has one micro-batch instead of two
PROMPT = "Once upon a time"
# the learning rates of the steps; DeepSpeed's schedulers take their first value twice
COSINE = [LEARNING_RATE * factor for factor in (0.0, 1.0, 0.75, 0.25)]
DECAY = [LEARNING_RATE * factor for factor in (0.0, 0.0, 0.5, 1.0)]


def generate(model: PreTrainedModel, folder: str, rank: int, **arguments: Any) -> list[int]:
    """Continue a prompt greedily; another rank writes more."""
    prompt = stories_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids
    return model.generate(prompt, max_new_tokens=4 + 5 * rank, do_sample=False, pad_token_id=0, **arguments)[0].tolist()


class GenerateOnEvaluate(TrainerCallback):
    """Generates during evaluation, as scripts do to show samples."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.texts: list[list[int]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.texts.append(generate(model, self.folder, args.process_index, synced_gpus=True))


def run_trainer(
    folder: str, output_dir: str, world_size: int, scheduler: str, checkpoint: str | None = None
) -> dict[str, Any]:
    with lomo_installed():
        model = stories_model(folder)
        params = {"warmup_type": "linear", "warmup_num_steps": 2, "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
        by_deepspeed = {"type": "WarmupDecayLR", "params": params | {"total_num_steps": "auto"}}
        arguments = {
            "trainer": {"lr_scheduler_type": "cosine", "warmup_steps": 1, "deepspeed": ds_config()},
            "deepspeed": {"warmup_steps": 2, "deepspeed": ds_config(scheduler=by_deepspeed)},
        }[scheduler]
        args = TrainingArguments(
            output_dir,
            **COMMON | batch_sizes(world_size) | arguments | {"save_strategy": "steps", "save_steps": 2},
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
        )
        rows, tokenizer = tokenized_rows(folder, ROWS), stories_tokenizer(folder)
        samples = GenerateOnEvaluate(folder)
        trainer = Trainer(
            model,
            args,
            DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows,
            eval_dataset=rows.select(range(6)),
            processing_class=tokenizer,
            callbacks=[samples],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(f"{output_dir}/final")
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        engine = type(trainer.model_wrapped).__name__
        return {"engine": engine, "logged": logged(trainer), "eval": losses, "texts": samples.texts}


@pytest.fixture
def reference(assets: Path, one_thread: None) -> Callable[[list[float], int], dict[str, Any]]:
    """Train plainly with these learning rates; evaluate and generate at the start and after every second step.

    Trainer's evaluation averages over the tokens of the rows that all ranks have at a time, and then over these means.
    """

    def train(learning_rates: list[float], world_size: int) -> dict[str, Any]:
        folder = str(assets)
        model, rows, tokenizer = stories_model(folder), tokenized_rows(folder, ROWS), stories_tokenizer(folder)
        collate = DataCollatorForSeq2Seq(tokenizer)
        records: list[tuple[float, float]] = []
        losses, texts = [], []
        for done in (0, 2, 4):
            if done:
                part = rows.select(range((done - 2) * BATCH, min(done * BATCH, ROWS)))
                records += train_plainly(model, part, collate, BATCH, learning_rates[done - 2 : done])
            model.eval()
            with torch.no_grad():
                batches = [collate([rows[i + j] for j in range(world_size)]) for i in range(0, 6, world_size)]
                losses.append(sum(float(model(**batch).loss) for batch in batches) / len(batches))
                texts.append([generate(model, folder, rank) for rank in (0, 1)])
        return {"model": model, "logged": records, "eval": losses, "texts": texts}

    return train


@pytest.mark.parametrize(("scheduler", "learning_rates"), [("trainer", COSINE), ("deepspeed", DECAY)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer_takes_the_steps_of_plain_sgd(
    ranks: GroupOf,
    assets: Path,
    tmp_path: Path,
    reference: Callable[[list[float], int], dict[str, Any]],
    world_size: int,
    scheduler: str,
    learning_rates: list[float],
) -> None:
    """Rows differ much in their numbers of labels, and the last step has fewer rows: a mean of means would differ."""
    expected = reference(learning_rates, world_size)
    results = ranks(world_size).run(run_trainer, str(assets), str(tmp_path), world_size, scheduler)
    for rank, result in enumerate(results):
        assert result["engine"] == "LomoEngine"
        assert largest_difference(result["logged"], expected["logged"]) < TOLERANCE
        assert result["eval"] == pytest.approx(expected["eval"], abs=TOLERANCE)
        assert result["texts"] == [texts[rank] for texts in expected["texts"]]
    assert weight_difference(f"{tmp_path}/final", expected["model"]) < TOLERANCE
    assert not list(Path(tmp_path, "final").glob("global_step*")), "a folder of a model, and of nothing else"


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_resumes(
    ranks: GroupOf,
    assets: Path,
    tmp_path: Path,
    reference: Callable[[list[float], int], dict[str, Any]],
    saved_on: int,
    resumed_on: int,
) -> None:
    ranks(saved_on).run(run_trainer, str(assets), str(tmp_path / "first"), saved_on, "trainer")
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    ranks(resumed_on).run(run_trainer, str(assets), str(tmp_path / "second"), resumed_on, "trainer", checkpoint)
    expected = reference(COSINE, 1)["model"]
    assert weight_difference(f"{tmp_path}/second/final", expected) < TOLERANCE
