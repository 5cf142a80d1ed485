"""launch/train.py --optim adamw | sgd: the same run as LOMO's but for one word, without checkpoints."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lomo_ds.data import PackedSequences
from lomo_ds.engine.baseline import BaselineEngine
from tests.data.datasets import load
from tests.launching import ROOT, demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]


@pytest.fixture(scope="module")
def short(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short validation text."""
    file = tmp_path_factory.mktemp("few") / "validation.txt"
    file.write_text("\n".join((demo / "validation.txt").read_text().splitlines()[:20]))
    return file


@torch.no_grad()
def loss_in_transformers(folder: Path, text: Path, cache: Path) -> float:
    """Held-out loss per token of an exported model, without lomo_ds's engines."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    blocks = PackedSequences(load(text, AutoTokenizer.from_pretrained(folder), cache), length=32)
    total, tokens = 0.0, 0
    for index in range(len(blocks)):
        batch = {name: value.unsqueeze(0) for name, value in blocks[index].items()}
        count = int((batch["labels"][:, 1:] != -100).sum())
        total, tokens = total + float(model(**batch).loss) * count, tokens + count
    return total / tokens


@pytest.mark.parametrize(("optim", "learning_rate", "precision"), [("adamw", 2e-3, "bf16"), ("sgd", 0.5, "fp32")])
def test_it_learns_and_exports_what_it_learnt(
    ranks: GroupOf, demo: Path, short: Path, tmp_path: Path, optim: str, learning_rate: float, precision: str
) -> None:
    arguments = demo_arguments(
        demo, tmp_path, optim=optim, learning_rate=learning_rate, validation_file=short, max_steps=8, logging_steps=4,
        gradient_accumulation_steps=2, warmup_ratio=0.25, gradient_checkpointing=True, sample_prompt="One day",
        sample_tokens=2, deepspeed=ROOT / f"ds_configs/zero3_{precision}.json",
    )  # fmt: skip
    results = ranks(2).run(run_main, arguments)
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[1][1] == "", "only rank 0 talks"
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert losses[-1] < losses[0] - 0.3
    assert [record["learning_rate"] for record in records[1:]] == pytest.approx(
        [learning_rate * 5 / 6, learning_rate / 6]
    )
    assert all(record["grad_norm"] > 0 and record["skipped_steps"] == 0 for record in records[1:])
    assert loss_in_transformers(tmp_path, short, tmp_path) == pytest.approx(losses[-1], abs=5e-3)
    resolved = json.loads((tmp_path / "ds_config.json").read_text())["optimizer"]
    assert (resolved["type"].lower(), resolved["params"]["lr"]) == (optim, learning_rate)


def test_sgd_in_fp32_is_lomo_in_fp32(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    for optim in ("lomo", "sgd"):
        arguments = demo_arguments(
            demo, tmp_path / optim, optim=optim, learning_rate=0.5, weight_decay=0.1, max_steps=4,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        results = ranks(2).run(run_main, arguments)
        assert results[0][0] == 0, results
    lomo, sgd = (load_file(tmp_path / optim / "model.safetensors") for optim in ("lomo", "sgd"))
    assert max(float((lomo[name] - sgd[name]).abs().max()) for name in lomo) < 1e-6


def stopped(argv: list[str]) -> tuple[int, str, str]:
    """launch/train.py, in which rank 1 receives SIGTERM in its second step."""
    train_batch = BaselineEngine.train_batch

    def signalled(engine: BaselineEngine, batch: Any) -> Any:
        loss = train_batch(engine, batch)
        if (int(os.environ["RANK"]), engine.global_steps) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    BaselineEngine.train_batch = signalled  # type: ignore[assignment, method-assign]
    try:
        return run_main(argv)
    finally:
        BaselineEngine.train_batch = train_batch  # type: ignore[method-assign]


def test_a_signal_ends_it_with_nothing_saved(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    results = ranks(2).run(stopped, demo_arguments(demo, tmp_path, optim="adamw", max_steps=5))
    assert [status for status, _, _ in results] == [0, 0], results
    said = results[0][1] + results[0][2]
    assert "stopped by a signal to another rank after step 2: nothing was saved, as --optim adamw keeps no " in said
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "model.safetensors").exists()


def test_a_finished_baseline_is_not_a_finished_lomo(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    for optim, more in (("sgd", {}), ("lomo", {"resume_from_checkpoint": "auto", "overwrite_output_dir": True})):
        results = ranks(2).run(run_main, demo_arguments(demo, tmp_path, optim=optim, max_steps=1, **more))
        assert results[0][0] == 0, results
        assert "nothing to do" not in results[0][1] + results[0][2]
    assert json.loads((tmp_path / "ds_config.json").read_text())["optimizer"]["type"] == "LOMO"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"save_steps": 2}, "--save_steps was asked for, but --optim adamw is there to compare with"),
        ({"deepspeed": "{folder}/stash.json"}, "got update_schedule too; remove that, or use --optim lomo"),
        ({"deepspeed": "{folder}/stage2.json"}, "ZeRO stage 3, got zero_optimization.stage 2"),
    ],
)
def test_errors_are_one_line_from_one_rank(
    ranks: GroupOf, demo: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    stash = {"type": "LOMO", "params": {"update_schedule": "stash"}}
    (tmp_path / "stash.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": stash}))
    (tmp_path / "stage2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    wrong = {name: str(value).format(folder=tmp_path) for name, value in wrong.items()}
    results = ranks(2).run(run_main, demo_arguments(demo, tmp_path / "out", optim="adamw", max_steps=1, **wrong))
    assert [status for status, _, _ in results] == [2, 2]
    errors = [err for _, _, err in results if err.strip()]
    assert len(errors) == 1, "one rank speaks"
    assert message in errors[0]
    assert "Traceback" not in errors[0]
