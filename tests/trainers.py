"""Transformers' Trainer and TRL's SFTTrainer on LOMO, and plain PyTorch on the same rows, for tests."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

import lomo_ds

STEPS = 4
BATCH = 8  # rows of a step, on all ranks and in all micro-batches
ACCUMULATION = 2
LEARNING_RATE = 0.05
TOLERANCE = 1e-5  # of losses, of norms in parts of themselves, and of weights
COMMON: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "learning_rate": LEARNING_RATE,
    "max_steps": STEPS, "max_grad_norm": 1.0, "save_strategy": "no", "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",  # so that the rows of a step follow from its number
}  # fmt: skip


def batch_sizes(world_size: int) -> dict[str, int]:
    return {
        "per_device_train_batch_size": BATCH // ACCUMULATION // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
        "per_device_eval_batch_size": 1,
    }


def ds_config(**changes: Any) -> dict[str, Any]:
    """Return a DeepSpeed config as people have it for Trainer, in which most values are "auto"."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "optimizer": {"type": "LOMO", "params": {"lr": "auto", "weight_decay": "auto"}},
    } | changes


@contextmanager
def new_process_state() -> Iterator[None]:
    """At the end, give accelerate, transformers and DeepSpeed the state that they have in a new process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    environment, initialize = dict(os.environ), deepspeed.initialize
    try:
        yield
    finally:
        deepspeed.initialize = initialize
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def lomo_installed() -> Iterator[None]:
    """Install lomo_ds in a ``new_process_state``."""
    with new_process_state(), lomo_ds.install():
        yield


def stories_model(folder: str, **config: Any) -> PreTrainedModel:
    """Load the real weights; fields of ``config`` replace those of the model's own."""
    return AutoModelForCausalLM.from_pretrained(f"{folder}/stories260K", **config)


def stories_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/stories260K")
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def instruction_rows(folder: str, count: int) -> Dataset:
    """Return instructions and answers, of very different lengths, as TRL's prompts and completions."""
    rows = json.loads(Path(folder, "instruct", "alpaca_999.json").read_text(encoding="utf-8"))[:count]
    return Dataset.from_list(
        [{"prompt": row["instruction"] + "\n", "completion": row["output"][: 20 + 9 * i]} for i, row in enumerate(rows)]
    )


def tokenized_rows(folder: str, count: int) -> Dataset:
    """Return instruction rows as ids and labels, of which those of the instruction are not trained on."""
    tokenizer = stories_tokenizer(folder)
    rows = []
    for row in instruction_rows(folder, count):
        prompt, answer = (tokenizer(row[name]).input_ids for name in ("prompt", "completion"))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def shuffled_trainer(folder: str, output_dir: str, world_size: int, **arguments: Any) -> Trainer:
    """Build a trainer with random numbers in every step: in the order of the rows and in dropout."""
    model = stories_model(folder, attention_dropout=0.2)
    chosen = {"train_sampling_strategy": "random", "lr_scheduler_type": "cosine", "deepspeed": ds_config()}
    args = TrainingArguments(output_dir, **COMMON | batch_sizes(world_size) | chosen | arguments)
    rows = tokenized_rows(folder, STEPS * BATCH)
    collate = DataCollatorForSeq2Seq(stories_tokenizer(folder))
    return Trainer(model, args, collate, train_dataset=rows, eval_dataset=rows.select(range(4)))


def logged(trainer: Trainer) -> list[tuple[float, float]]:
    """Return the loss and the gradient norm of each step of a trainer."""
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def token_mean(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return the loss averaged over all labelled tokens of the batch."""
    return model(**batch, use_cache=False).loss


def train_plainly(
    model: PreTrainedModel,
    rows: Dataset,
    collate: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    learning_rates: list[float],
    max_norm: float = 1.0,
    loss_of: Callable[[PreTrainedModel, dict[str, Any]], Tensor] = token_mean,
) -> list[tuple[float, float]]:
    """Train ``model`` by torch's SGD in one process, on whole batches of consecutive rows.

    Returns:
        The loss and the gradient norm of each step.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    records = []
    for step, lr in enumerate(learning_rates):
        last = min((step + 1) * batch_size, len(rows))
        batch = collate([rows[index] for index in range(step * batch_size, last)])
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        records.append((loss.item(), norm.item()))
    return records


def largest_difference(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Return the largest difference of a loss, and of a norm in parts of itself."""
    assert len(one) == len(other)
    pairs = zip(one, other, strict=True)
    return max(max(abs(a[0] - b[0]), abs(a[1] - b[1]) / b[1]) for a, b in pairs)


def weight_difference(saved: str, expected: PreTrainedModel) -> float:
    """Return the largest difference of a weight in a saved folder to ``expected``."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    weights = dict(expected.named_parameters())
    return max(float((p - weights[name]).detach().abs().max()) for name, p in model.named_parameters())
