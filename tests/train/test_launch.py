"""launch/train.py as a user runs it: what it leaves behind, and how it says no."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lomo_ds.models.presets import preset_config
from tests.launching import ROOT, demo_arguments, run_main
from tests.limits import HUNG
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
BIN = Path(sys.executable).parent


# what a run leaves behind


@pytest.fixture(scope="module")
def finished(ranks: GroupOf, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A short run on two ranks: its output_dir, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    validation = out / "few.jsonl"
    lines = (demo / "validation.txt").read_text().splitlines()[:20]
    validation.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    arguments = demo_arguments(
        demo, out, validation_file=validation, learning_rate=0.5, max_steps=6, logging_steps=2, eval_steps=3,
        gradient_accumulation_steps=2, warmup_ratio=0.5, gradient_checkpointing=True, sample_prompt="One day",
        sample_tokens=4,
    )  # fmt: skip
    results = ranks(2).run(run_main, arguments)
    assert [status for status, _, _ in results] == [0, 0], results
    assert results[1][1] == "", "only rank 0 talks"
    return out, results[0][1]


def test_the_folder_is_a_model_that_transformers_loads(finished: tuple[Path, str], demo: Path) -> None:
    out, _ = finished
    model = AutoModelForCausalLM.from_pretrained(out)
    untrained = AutoModelForCausalLM.from_pretrained(demo / "model")
    assert not torch.equal(model.model.norm.weight, untrained.model.norm.weight), "norms train, and are saved so"
    assert AutoTokenizer.from_pretrained(out)("fox").input_ids


def test_metrics_have_one_object_per_logged_step(finished: tuple[Path, str]) -> None:
    records = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 3, 4, 6]
    trained = [record for record in records if "loss" in record]
    assert [record["step"] for record in trained] == [2, 4, 6]
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 3, 6]
    for name in ("learning_rate", "grad_norm", "tokens_per_second", "loss_scale", "skipped_steps", "epoch"):
        assert all(math.isfinite(record[name]) for record in trained), name
    assert [record["tokens"] for record in trained] == [2 * 2 * 2 * 32 * step for step in (2, 4, 6)]
    assert [record["learning_rate"] for record in trained] == pytest.approx([0.5 / 3, 0.5, 0.5 / 3])


def test_tensorboard_holds_the_same(finished: tuple[Path, str]) -> None:
    events = EventAccumulator(str(finished[0] / "runs")).Reload()
    assert {"train/loss", "eval/loss", "train/grad_norm", "train/learning_rate", "train/loss_scale",
            "train/tokens_per_second", "train/skipped_steps"} <= set(events.Tags()["scalars"])  # fmt: skip
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


def test_the_resolved_config_runs_the_same_again(finished: tuple[Path, str], ranks: GroupOf, tmp_path: Path) -> None:
    out, _ = finished
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    assert (resolved["max_grad_norm"], resolved["max_seq_length"]) == (1.0, 32)
    assert json.loads((out / "ds_config.json").read_text())["optimizer"]["params"]["lr"] == 0.5
    again = ranks(2).run(run_main, ["--config", str(out / "config.yaml"), f"--output_dir={tmp_path}"])
    assert again[0][0] == 0, again
    first, second = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_says_what_it_does(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "2 sequences x 2 accumulated = 4 per GPU, x 2 GPUs = 8 in total; 256 tokens per step" in printed
    assert "held-out loss: " in printed
    assert "before: 'One day" in printed
    assert str(out / "metrics.jsonl") in printed


def test_help_names_every_argument() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "launch/train.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--max_grad_norm" in done.stdout


def test_a_preset_trains_from_nothing(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    more = {"model_name_or_path": "40m", "tokenizer_name": demo / "model"}
    results = ranks(2).run(run_main, demo_arguments(demo, tmp_path, max_steps=1, logging_steps=1, **more))
    assert results[0][0] == 0, results
    assert "model: 38.74M parameters" in results[0][1]
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    # weights of N(0, 0.02^2) give logits of variance v = 0.02^2 x hidden size, and so a loss of log(32000) + v / 2
    expected = math.log(32000) + 0.02**2 * preset_config("40m").hidden_size / 2
    assert record["loss"] == pytest.approx(expected, abs=0.1), "of a model that knows nothing"


# how it says no


@pytest.fixture(scope="module")
def broken(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are wrong, each in its own way."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "empty.txt").touch()
    (folder / "json.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "fields.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    (folder / "empty_folder").mkdir()
    small = folder / "small"
    small.mkdir()
    config = json.loads((demo / "model/config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    for name in ("tokenizer.model", "tokenizer_config.json", "model.safetensors"):
        (small / name).symlink_to(demo / "model" / name)
    for name, changed in {
        "t5": {"model_type": "t5"},
        "act": config | {"hidden_act": "gelu_newest"},
        "quantized": config | {"quantization_config": {"quant_method": "gptq"}, "num_hidden_layers": 1},
    }.items():
        shutil.copytree(demo / "model", folder / name, ignore=shutil.ignore_patterns("lomo_ds_manifest.json"))
        (folder / name / "config.json").write_text(json.dumps(changed))
    (folder / "clash.json").write_text(
        json.dumps({"gradient_clipping": 0.5, "zero_optimization": {"stage": 3}, "optimizer": {"type": "LOMO"}})
    )
    (folder / "stage2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "optimizer": {"type": "LOMO"}}))
    zero = {"stage": 3, "stage3_typo": 1, "reduce_bucket_size": -5}
    (folder / "deepspeed.json").write_text(json.dumps({"zero_optimization": zero, "optimizer": {"type": "LOMO"}}))
    (folder / "file").touch()
    return folder


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_file": "{broken}/nowhere.txt"}, "nowhere.txt cannot be read: No such file"),
        ({"train_file": "{broken}/empty.txt"}, "empty.txt holds no text"),
        ({"train_file": "{broken}/json.jsonl"}, "json.jsonl line 2 is not valid JSON"),
        ({"train_file": "{broken}/fields.jsonl"}, r"fields.jsonl line 2 must have the column 'text', as the first"),
        ({"validation_file": "{broken}/empty.txt"}, "empty.txt holds no text"),
        ({"model_name_or_path": "{broken}/empty_folder"}, "holds a config.json"),
        (
            {"model_name_or_path": "{broken}/small"},
            r"train\.txt has the token .* embedding has 100 rows, .* --tokenizer_name",
        ),
        ({"model_name_or_path": "{broken}/t5"}, "only causal language models can be trained, got .*a t5 model"),
        ({"model_name_or_path": "{broken}/act"}, "no model can be built from .*act: KeyError: 'gelu_newest'"),
        ({"model_name_or_path": "{broken}/quantized"}, "is quantized .gptq.; full fine-tuning needs its original"),
        ({"max_seq_length": 4096}, "--max_seq_length 4096 is longer than the model's 128 positions"),
        ({"learning_rte": 1}, "unknown argument --learning_rte; did you mean '--learning_rate'"),
        (
            {"deepspeed": "{broken}/clash.json", "max_grad_norm": 2.0},
            "gradient_clipping 0.5 against --max_grad_norm 2.0",
        ),
        ({"deepspeed": "{broken}/stage2.json"}, "ZeRO stage 3, got zero_optimization.stage 2"),
        (
            {"deepspeed": "{broken}/deepspeed.json"},
            "DeepSpeed rejects DeepSpeedZeroConfig reduce_bucket_size: .* greater than 0; stage3_typo: ",
        ),
        ({"deepspeed": "{broken}/nowhere.json"}, "nowhere.json cannot be read"),
        (
            {"model_name_or_path": "{broken}/small", "output_dir": "{broken}/small/out"},
            "small/out is inside the input folder .*small, where nothing may be written; give .*small-2",
        ),
        ({"output_dir": "{broken}/file/below"}, "--output_dir .* cannot be created: Not a directory"),
    ],
)
def test_errors_are_one_line_from_one_rank(
    ranks: GroupOf, demo: Path, broken: Path, tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    wrong = {name: value.format(broken=broken) if isinstance(value, str) else value for name, value in wrong.items()}
    arguments = demo_arguments(demo, tmp_path, max_steps=1, **wrong)
    results = ranks(2).run(run_main, arguments)
    assert [status for status, _, _ in results] == [2, 2]
    errors = [err for _, _, err in results if err.strip()]
    assert len(errors) == 1, "one rank speaks"
    lines = [line for line in errors[0].splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in errors[0]
    assert re.search(message, lines[0]), lines[0]


def test_debug_shows_the_traceback_and_the_library_s_error(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/tokenizer.json").write_text("{")
    (tmp_path / "in/tokenizer_config.json").write_text("{}")
    argv = demo_arguments(demo, tmp_path / "out", tokenizer_name=tmp_path / "in")
    (status, _, shown), (_, _, other) = ranks(2).run(run_main, [*argv, "--debug"])
    assert status == 2
    assert "JSONDecodeError: " in shown
    assert shown.splitlines()[-1].startswith("error: ")
    assert not other.strip(), "one rank speaks"


def launched(launcher: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    command = [*launcher, str(ROOT / "launch/train.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HUNG, env=environment, cwd=ROOT)


def test_the_deepspeed_launcher_ends_with_the_error_message(demo: Path, tmp_path: Path) -> None:
    launcher = [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", "29611"]
    done = launched(launcher, demo_arguments(demo, tmp_path, train_file="nowhere.txt"))
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "error: nowhere.txt cannot be read: No such file or directory\n" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_runs_under_plain_python(demo: Path, tmp_path: Path) -> None:
    """And under torchrun in the tests of SLURM."""
    done = launched([sys.executable], demo_arguments(demo, tmp_path, max_steps=2))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.safetensors").is_file()


# on real weights


def shakespeare(ranks: GroupOf, assets: Path, out: Path, **more: Any) -> list[float]:
    """Held-out losses of a run on the real weights, before and after training; several ranks take the same steps."""
    arguments = {
        "model_name_or_path": assets / "stories260K",
        "train_file": assets / "text/tinyshakespeare_train.txt",
        "validation_file": assets / "text/tinyshakespeare_val.txt",
        "max_seq_length": 128,
        "output_dir": out,
    } | more
    results = ranks(1).run(run_main, [f"--{name}={value}" for name, value in arguments.items()])
    assert results[0][0] == 0, results
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def test_shakespeare_reaches_2_80(ranks: GroupOf, assets: Path, tmp_path: Path) -> None:
    """torch.optim.SGD with the same clip (--optim sgd) reaches 2.788."""
    config = ROOT / "ds_configs/zero3_fp32.json"
    more = {"per_device_train_batch_size": 8, "learning_rate": 1.0, "max_steps": 150, "deepspeed": config}
    before, after = shakespeare(ranks, assets, tmp_path, **more)
    assert before == pytest.approx(4.98, abs=0.1)
    assert after == pytest.approx(2.790, abs=0.01)
    assert after < 2.80


def test_bf16_with_stochastic_rounding_learns_what_fp32_does(ranks: GroupOf, assets: Path, tmp_path: Path) -> None:
    """At a small learning rate most updates are less than half of the distance to the next bf16 number."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text((assets / "text/tinyshakespeare_val.txt").read_text()[:10_000])
    losses = {}
    for precision, rounding in (("fp32", "auto"), ("bf16", "stochastic"), ("bf16", "nearest")):
        config = json.loads((ROOT / f"ds_configs/zero3_{precision}.json").read_text())
        config["optimizer"]["params"]["rounding"] = rounding
        file = tmp_path / f"{precision}_{rounding}.json"
        file.write_text(json.dumps(config))
        more = {"per_device_train_batch_size": 4, "learning_rate": 0.02, "max_steps": 10, "deepspeed": file}
        out = tmp_path / f"{precision}_{rounding}"
        *_, losses[rounding] = shakespeare(ranks, assets, out, validation_file=held_out, **more)
    assert losses["stochastic"] == pytest.approx(losses["auto"], abs=0.02), "fp32 and stochastic rounding"
    assert losses["nearest"] > losses["auto"] + 0.1, "small updates are lost"
