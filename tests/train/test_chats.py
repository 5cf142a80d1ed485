"""launch/train.py on conversations: what is learnt, resumed and exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, GenerationConfig, pipeline

from tests.data.datasets import write_jsonl
from tests.launching import ROOT, demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]


def alpaca_arguments(assets: Path, out: Path, **more: Any) -> list[str]:
    defaults: dict[str, Any] = {
        "model_name_or_path": assets / "stories260K", "train_file": assets / "instruct/alpaca_999.json",
        "max_seq_length": 256, "packing": True, "learning_rate": 1.0, "per_device_train_batch_size": 8,
        "deepspeed": ROOT / "ds_configs/zero3_auto.json",
    }  # fmt: skip
    return demo_arguments(out, out, **defaults | more)


def losses(out: Path) -> list[float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def test_answers_are_learnt_and_the_exported_folder_chats(ranks: GroupOf, assets: Path, tmp_path: Path) -> None:
    """Take the README's steps: the held-out loss of the answers falls by at least 1.5 nats per token."""
    run = alpaca_arguments(assets, tmp_path, max_steps=200, validation_split_percentage=10, logging_steps=50,
                           sample_prompt="Name a color.", sample_tokens=8)  # fmt: skip
    results = ranks(2).run(run_main, run)
    assert [status for status, _, _ in results] == [0, 0], results
    before, after = losses(tmp_path)
    assert before - after >= 1.5

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert "### Response" in tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == tokenizer.eos_token_id
    chat = pipeline("text-generation", model=str(tmp_path), device="cpu")
    [answered] = chat([{"role": "user", "content": "Name a color."}], max_new_tokens=8, do_sample=False)
    *_, answer = answered["generated_text"]
    assert answer["role"] == "assistant"
    assert answer["content"].strip()
    assert f"after:  {answer['content']!r}" in results[0][1]


def test_resuming_within_a_packed_epoch_is_bit_exact(ranks: GroupOf, assets: Path, tmp_path: Path) -> None:
    rows = json.loads((assets / "instruct/alpaca_999.json").read_text())[:60]
    more = {
        "train_file": write_jsonl(tmp_path / "a.jsonl", rows), "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "save_steps": 3, "num_train_epochs": 1.5, "logging_steps": 1,
        "packing_strategy": "bfd_split", "deepspeed": ROOT / "ds_configs/zero3_bf16.json",
    }  # fmt: skip
    for name, resumed in (("whole", {}), ("resumed", {"resume_from_checkpoint": tmp_path / "whole/checkpoint-3"})):
        run = alpaca_arguments(assets, tmp_path / name, **more | resumed)
        results = ranks(2).run(run_main, run)
        assert [status for status, _, _ in results] == [0, 0], results
    whole, resumed_weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(whole[name].equal(weights) for name, weights in resumed_weights.items())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"messages": [{"role": "user"}]}],
         "rows.jsonl line 1: 'messages[0].content' must be text, as there are no tool_calls, got null; "
         "--on_bad_rows skip leaves such rows out"),
        ([{"question": "q", "answer": "a"}], "rows.jsonl line 1 must have the columns of a format"),
        ([{"messages": [{"role": "cat", "content": "q"}]}],
         "rows.jsonl line 1: the tokenizer's chat template cannot render the messages: a message is from system"),
    ],
)  # fmt: skip
def test_a_bad_row_is_reported_once(ranks: GroupOf, demo: Path, tmp_path: Path, rows: list[Any], message: str) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    results = ranks(2).run(run_main, demo_arguments(demo, tmp_path / "out", train_file=file))
    assert [status for status, _, _ in results] == [2, 2]
    said = [err for _, _, err in results if "error: " in err]
    assert len(said) == 1
    assert message in said[0]
