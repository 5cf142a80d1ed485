"""Tokens, labels and packing against TRL's, for the same rows and the same chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lomo_ds.data import IGNORE_INDEX, PackedSequences, Samples, TrainingSteps
from lomo_ds.data.sequences import pad
from lomo_ds.models import add_special_tokens, set_chat_template
from lomo_ds.models.chat_template import SHIPPED
from tests.data.datasets import load, make_samples, write_jsonl

Row = dict[str, Any]
CHATML = (SHIPPED / "chatml.jinja").read_text()
UNMARKED = CHATML.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")

needs_whole_masks = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="transformers before 5.24 may leave the white space that ends a marked answer without a label",
)


@pytest.fixture
def alpaca(assets: Path) -> list[Row]:
    return json.loads((assets / "instruct/alpaca_999.json").read_text())


def tokenizer_with(assets: Path, template: str) -> Any:
    """Return the tokenizer of stories260K with a chat template, and the tokens that ChatML needs."""
    tokenizer = AutoTokenizer.from_pretrained(assets / "stories260K")
    if template == "alpaca":
        set_chat_template(tokenizer, template)
    else:
        add_special_tokens(tokenizer, None, ["<|im_start|>", "<|im_end|>"])
        tokenizer.chat_template = template
    return tokenizer


def question(row: Row) -> str:
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str) -> Row:
    return {"role": "assistant", "content": content}


FORMATS: dict[str, Callable[[Row], Row]] = {
    "alpaca": lambda row: row,
    "messages": lambda row: {"messages": [user(question(row)), assistant(row["output"])]},
    "conversations": lambda row: {
        "conversations": [{"from": "human", "value": question(row)}, {"from": "gpt", "value": row["output"]}]
    },
    "prompt_completion": lambda row: {"prompt": [user(question(row))], "completion": [assistant(row["output"])]},
}


def trl_dataset(rows: list[Row], tokenizer: Any, folder: Path, **settings: Any) -> Any:
    """Return what SFTTrainer trains on."""
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=600)
    arguments = SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, bf16=False, **settings)
    return SFTTrainer(
        LlamaForCausalLM(config), arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    ).train_dataset


def as_lists(samples: Samples) -> list[tuple[list[int], list[int]]]:
    return [
        (samples.ids[start:stop].tolist(), samples.labels[start:stop].tolist())
        for start, stop in zip(samples.starts[:-1], samples.starts[1:], strict=True)
    ]


@needs_whole_masks
@pytest.mark.parametrize("template", ["alpaca", CHATML, UNMARKED], ids=["alpaca", "chatml", "no markers"])
def test_every_format_gives_the_tokens_and_labels_of_trl(
    assets: Path, alpaca: list[Row], tmp_path: Path, template: str
) -> None:
    """Without markers, TRL has no mask of the assistant's messages, but one of a completion, by common prefixes."""
    tokenizer, rows = tokenizer_with(assets, template), alpaca[:50]
    samples = {
        name: as_lists(load(write_jsonl(tmp_path / f"{name}.jsonl", list(map(convert, rows))), tokenizer))
        for name, convert in FORMATS.items()
    }
    masks: dict[str, dict[str, Any]] = {"prompt_completion": {}} | (
        {} if template == UNMARKED else {"messages": {"assistant_only_loss": True}}
    )
    for name, mask in masks.items():
        trl = trl_dataset(list(map(FORMATS[name], rows)), tokenizer, tmp_path, max_length=None, **mask)
        assert samples[name] == list(zip(trl["input_ids"], trl["labels"], strict=True))
    assert all(sample == samples["alpaca"] for sample in samples.values())
    stop = tokenizer.eos_token_id if template == "alpaca" else tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, (ids, labels) in zip(rows, samples["alpaca"], strict=True):
        answer = [label for label in labels if label != IGNORE_INDEX]
        assert stop in answer, "the model learns where an answer ends"
        assert tokenizer.decode(answer, skip_special_tokens=True).strip() == row["output"].strip()
        assert labels[len(ids) - len(answer) :] == answer, "no token of the prompt has a label"


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    user("One?"),
    assistant("1"),
    user("And two?"),
    assistant("2, of course"),
]


@needs_whole_masks
@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["markers", "no markers"])
def test_all_turns_of_the_assistant_are_trained(assets: Path, tmp_path: Path, template: str) -> None:
    rows = [{"messages": CONVERSATION}]
    samples = as_lists(load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer_with(assets, template)))
    tokenizer = tokenizer_with(assets, CHATML)
    trl = trl_dataset(rows, tokenizer, tmp_path, max_length=None, assistant_only_loss=True)
    assert samples == list(zip(trl["input_ids"], trl["labels"], strict=True))


@pytest.mark.parametrize(
    ("rows", "options", "trl_options"),
    [
        ([{"messages": CONVERSATION}], {"assistant_only_loss": False}, {}),
        ([{"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}], {}, {}),
        ([{"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}], {"assistant_only_loss": True},
         {"assistant_only_loss": True}),
        ([{"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}],
         {"assistant_only_loss": True, "completion_only_loss": False},
         {"assistant_only_loss": True, "completion_only_loss": False}),
        ([{"prompt": "Once upon", "completion": " a time"}], {}, {}),
        ([{"prompt": "Once upon", "completion": " a time</s>"}], {}, {}),
        ([{"prompt": "Once upon ", "completion": "a time"}], {"completion_only_loss": False},
         {"completion_only_loss": False}),
        ([{"prompt": "", "completion": "a time"}], {}, {}),
        ([{"text": "Once upon a time"}, {"text": "the end"}], {}, {}),
        ([{"story": "Once upon a time"}], {"text_field": "story"}, {"dataset_text_field": "story"}),
        ([{"input_ids": [1, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [1, 7], "labels": [1, 7]}], {}, {}),
    ],
    ids=["whole chat", "completion of turns", "answers of a completion", "answers of both", "completion",
         "ended completion", "whole text", "no prompt", "text", "text field", "tokenized"],
)  # fmt: skip
def test_other_masks_and_formats(
    assets: Path, tmp_path: Path, rows: list[Row], options: dict[str, Any], trl_options: dict[str, Any]
) -> None:
    tokenizer = tokenizer_with(assets, CHATML)
    samples = as_lists(load(write_jsonl(tmp_path / "a.jsonl", rows), tokenizer, **options))
    trl = trl_dataset(rows, tokenizer, tmp_path, max_length=None, **trl_options)
    assert samples == list(zip(trl["input_ids"], trl["labels"], strict=True))


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(2, 30), min_size=1, max_size=40), length=st.integers(4, 24))
@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_packing_is_trls(strategy: Any, lengths: list[int], length: int) -> None:
    samples = make_samples(lengths)
    packed = PackedSequences(samples, length, strategy)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in as_lists(samples)]
    trl = pack_dataset(Dataset.from_list(rows), length, strategy)
    rows_packed = [packed[index]["input_ids"][: packed.sizes[index]].tolist() for index in range(len(packed))]
    assert rows_packed == [list(ids) for ids in trl["input_ids"]]


class TrlSequences:
    """The rows of a dataset that TRL has packed, each as TRL's collator hands it to the model."""

    length = 256
    has_documents = True

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        self.sizes = np.asarray([len(ids) for ids in dataset["input_ids"]])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        batch = self.collate([self.dataset[index]])
        item = {name: batch[name][0] for name in ("input_ids", "labels", "position_ids")}
        return pad(item | {"real": torch.ones_like(item["labels"])}, self.length)

    def digest(self) -> str:
        raise NotImplementedError


def test_every_batch_of_a_packed_run_is_trls(assets: Path, alpaca: list[Row], tmp_path: Path) -> None:
    """Compare 200 steps of two ranks.

    TRL leaves out rows without anything to learn only where it does not pack, so its rows are packed afterwards.
    """
    tokenizer = tokenizer_with(assets, "alpaca")
    rows = list(map(FORMATS["messages"], alpaca))
    trl = trl_dataset(rows, tokenizer, tmp_path, max_length=256, assistant_only_loss=True)
    trl = pack_dataset(trl.select_columns(["input_ids", "labels"]), 256, "bfd")
    sequences = PackedSequences(load(assets / "instruct/alpaca_999.json", tokenizer, tmp_path / "cache"), 256, "bfd")
    for rank in range(2):
        runs = (TrainingSteps(data, 8, 1, rank, 2, 0, 1.0, max_steps=200) for data in (sequences, TrlSequences(trl)))
        for batches in zip(*runs, strict=True):
            for batch, expected in zip(*batches, strict=True):
                assert batch["input_ids"].equal(expected["input_ids"])
                assert batch["labels"].equal(expected["labels"])
                assert (batch["position_ids"] * expected["real"]).equal(expected["position_ids"])
