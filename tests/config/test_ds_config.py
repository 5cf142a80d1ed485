"""The ds_config and the command line made one."""

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig, SegformerConfig
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from lomo_ds.config.arguments import TrainArguments, parse_arguments
from lomo_ds.config.ds_config import fill_buckets, fill_precision, fill_scheduler, read_ds_config, reconcile
from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.config.validation import validate_baseline_config, validate_ds_config
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
REQUIRED = ["--model_name_or_path", "m", "--train_file", "t.txt", "--output_dir", "o"]


def merged(config: dict[str, Any], *argv: str, world_size: int = 2) -> tuple[dict[str, Any], TrainArguments]:
    arguments, given = parse_arguments([*REQUIRED, *argv])
    return reconcile(config, arguments, given, world_size)


def trained_on(config: dict[str, Any], *argv: str) -> dict[str, Any]:
    """The config that a run of launch/train.py on one rank, of 10 steps and a model 64 wide, would train with."""
    arguments, given = parse_arguments([*REQUIRED, *argv])
    config = fill_precision(config, given, "fp32")[0]
    config, arguments = reconcile(config, arguments, given, world_size=1)
    config = fill_buckets(fill_scheduler(config, arguments, total_steps=10), LlamaConfig(hidden_size=64))
    config = complete_ds_config(config, world_size=1)
    (validate_baseline_config if arguments.is_baseline else validate_ds_config)(config)
    parse_ds_config(config)
    return config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_fills_up_and_passes(path: Path) -> None:
    config, arguments = merged(read_ds_config(str(path)), "--learning_rate", "0.5")
    config = fill_scheduler(config, arguments, total_steps=10)
    assert config["optimizer"]["params"]["lr"] == 0.5
    assert config["gradient_clipping"] == 1.0
    assert config["train_batch_size"] == 16
    validate_ds_config(config)


def test_an_argument_not_given_takes_the_ds_configs_value() -> None:
    config = {"bf16": {"enabled": True}, "gradient_clipping": 0.5, "optimizer": {"params": {"lr": 0.7}}}
    _, arguments = merged(config)
    assert (arguments.bf16, arguments.max_grad_norm, arguments.learning_rate) == (True, 0.5, 0.7)


@pytest.mark.parametrize("written", [{}, {"gradient_clipping": None}, {"gradient_clipping": "auto"}], ids=str)
def test_a_field_that_is_absent_takes_the_argument_and_its_default(written: dict[str, Any]) -> None:
    config, arguments = merged(written)
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_clipping"] == arguments.max_grad_norm == TrainArguments.max_grad_norm == 1.0
    assert merged(written, "--max_grad_norm", "2")[0]["gradient_clipping"] == 2.0
    assert merged(written, "--max_grad_norm", "0")[0]["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    "params", [{"clip_group_norm": 1.0}, {"clip_grad_value": 1.0}, {"update_schedule": "immediate"}]
)
@pytest.mark.parametrize("written", [{}, {"gradient_clipping": "auto"}], ids=str)
def test_the_default_clip_gives_way_to_what_was_asked_for(
    params: dict[str, Any], written: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = {**written, "optimizer": {"type": "LOMO", "params": params}}
    with caplog.at_level(logging.INFO, logger="lomo_ds"):
        merged_config, arguments = merged(config)
    assert (merged_config["gradient_clipping"], arguments.max_grad_norm) == (0.0, 0.0)
    asked = next(iter(params))
    assert f"gradient_clipping: none, as the default of --max_grad_norm gives way to {asked}" in caplog.text
    assert merged(config, "--max_grad_norm", "1")[0]["gradient_clipping"] == 1.0


@pytest.mark.parametrize("broken", [{"bf16": True}, {"optimizer": {"params": ["lr"]}}, {"scheduler": "linear"}])
def test_a_section_must_be_an_object(broken: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be an object in braces"):
        merged(broken)


def test_the_scheduler_is_filled_once_the_steps_are_known() -> None:
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 3, "total_num_steps": "auto"}
    config, arguments = merged({"scheduler": {"type": "WarmupDecayLR", "params": params}}, "--learning_rate", "0.5")
    filled = fill_scheduler(config, arguments, total_steps=40)["scheduler"]["params"]
    assert filled == {"warmup_min_lr": 0.0, "warmup_max_lr": 0.5, "warmup_num_steps": 3, "total_num_steps": 40}
    assert params["total_num_steps"] == "auto", "the caller's own is untouched"


@pytest.mark.parametrize(
    ("config", "argv", "message"),
    [
        (
            {"optimizer": {"params": {"lr": 0.1}}, "gradient_clipping": 1.0},
            ["--learning_rate", "0.2", "--max_grad_norm", "2"],
            r"gradient_clipping 1.0 against --max_grad_norm 2.0; optimizer.params.lr 0.1 against --learning_rate 0.2",
        ),
        ({"bf16": {"enabled": True}}, ["--fp16"], "bf16 and fp16"),
        ({"fp16": {"enabled": True}}, ["--fp16", "false"], "fp16.enabled true against --fp16 False"),
        ({"train_batch_size": 7}, [], r"train_batch_size 7 .* 8 x .* 1 x 2 GPUs = 16"),
        ({"scheduler": {"type": "WarmupLR"}}, ["--warmup_ratio", "0.1"], "scheduler WarmupLR against --warmup_ratio"),
    ],
)
def test_disagreements_name_both_sides(config: dict[str, Any], argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged(config, *argv)


def test_a_resolved_config_goes_with_the_scheduler_it_was_resolved_against() -> None:
    merged({"scheduler": {"type": "WarmupLR"}}, "--warmup_ratio", "0.0", "--lr_scheduler_type", "linear")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("optim", "filled"),
    [
        ("adamw", {"type": "AdamW", "params": {"lr": 5e-5, "weight_decay": 0.1, "torch_adam": True, "fused": True}}),
        ("sgd", {"type": "SGD", "params": {"lr": 0.03, "weight_decay": 0.1, "fused": True}}),
    ],
)
def test_a_baseline_takes_the_place_of_lomo(path: Path, optim: str, filled: dict[str, Any]) -> None:
    given = read_ds_config(str(path))
    config, arguments = merged(given, "--optim", optim, "--weight_decay", "0.1")
    config = fill_scheduler(config, arguments, total_steps=10)
    assert config["optimizer"] == filled
    validate_baseline_config(config)
    assert merged(config, "--optim", optim)[0] == config, "which is its own place too"
    assert given["optimizer"]["type"] == "LOMO", "the caller's own is untouched"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_adalomo_takes_the_place_of_lomo(path: Path) -> None:
    given = read_ds_config(str(path))
    config, arguments = merged(given, "--optim", "adalomo", "--weight_decay", "0.1")
    expected, _ = merged(given, "--learning_rate", "5e-4", "--max_grad_norm", "0", "--weight_decay", "0.1")
    assert config == expected | {"optimizer": expected["optimizer"] | {"type": "AdaLomo"}}
    validate_ds_config(fill_scheduler(config, arguments, total_steps=10))
    assert merged(config, "--optim", "adalomo")[0] == config, "which is its own place too"
    assert given["optimizer"]["type"] == "LOMO", "the caller's own is untouched"


@pytest.mark.parametrize("kind", ["AdaLomo", "adalomo"])
def test_adalomo_of_the_ds_config_is_adopted(kind: str) -> None:
    """AdaLomo's defaults give way to values of the DeepSpeed config and to arguments."""

    def values(config: dict[str, Any], arguments: TrainArguments) -> tuple[Any, ...]:
        in_config = config["optimizer"]["params"]["lr"], config["gradient_clipping"]
        assert in_config == (arguments.learning_rate, arguments.max_grad_norm)
        return config["optimizer"]["type"], arguments.optim, *in_config

    optimizer = {"type": kind, "params": {"lr": "auto"}}
    assert values(*merged({"optimizer": optimizer})) == ("AdaLomo", "adalomo", 5e-4, 0.0)
    assert values(*merged({"optimizer": {"type": kind}})) == ("AdaLomo", "adalomo", 5e-4, 0.0)
    argv = ["--learning_rate", "0.1", "--max_grad_norm", "2"]
    assert values(*merged({"optimizer": optimizer}, *argv)) == ("AdaLomo", "adalomo", 0.1, 2.0)
    config = {"optimizer": {"type": kind, "params": {"lr": 0.2}}, "gradient_clipping": 0.5}
    assert values(*merged(config)) == ("AdaLomo", "adalomo", 0.2, 0.5)
    assert values(*merged({"optimizer": optimizer}, "--optim", "adalomo")) == ("AdaLomo", "adalomo", 5e-4, 0.0)


@pytest.mark.parametrize(
    ("kind", "optim", "way_out"),
    [
        ("AdaLomo", "lomo", 'write "optimizer": {"type": "LOMO", "params": {"lr": "auto"}}, give --optim adalomo, or'),
        ("AdaLomo", "adamw", 'write "optimizer": {"type": "LOMO", "params": {"lr": "auto"}}, give --optim adalomo, or'),
        (
            "AdamW",
            "adalomo",
            'write "optimizer": {"type": "AdaLomo", "params": {"lr": "auto"}}, give --optim adamw, or',
        ),
        ("Muon", "adalomo", 'write "optimizer": {"type": "AdaLomo", "params": {"lr": "auto"}}, or leave'),
    ],
)
def test_another_optimizer_than_that_of_the_ds_config_is_an_error(kind: str, optim: str, way_out: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        merged({"optimizer": {"type": kind, "params": {"lr": "auto"}}}, "--optim", optim)
    assert f"the DeepSpeed config names the optimizer '{kind}', and --optim is {optim}; {way_out}" in str(refusal.value)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"type": "LOMO", "params": {"update_schedule": "stash"}}, "lr and weight_decay, got update_schedule too"),
        (
            {"type": "LOMO", "params": {"clip_group_norm": 1.0, "stash_device": "cpu"}},
            "got clip_group_norm and stash_device too; remove that, or use --optim lomo or adalomo",
        ),
        ({"params": {"clip_grad_value": 1.0}}, "got clip_grad_value too"),
        ({"type": "AdamW", "params": {"betas": [0.9, 0.95]}}, "got betas too"),
        ({"type": "Muon"}, "names the optimizer 'Muon', and --optim is adamw; write"),
    ],
)
def test_settings_without_meaning_for_a_baseline(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        merged({"optimizer": optimizer}, "--optim", "adamw")
    unset = {"update_schedule": "auto", "clip_grad_value": None, "rounding": "stochastic"}
    merged({"optimizer": {"type": "LOMO", "params": unset}}, "--optim", "adamw")


def test_an_auto_without_a_value_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization\.sub_group_size \(write an integer\)"):
        trained_on({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ds_config(str(tmp_path / "nowhere.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{,}")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_ds_config(str(broken))
    broken.write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="must hold a JSON object, got list"):
        read_ds_config(str(broken))


@pytest.mark.parametrize(
    ("timers", "enabled"),
    [(None, False), ({}, False), ({"throughput": {"synchronized": False}}, False)]
    + [({"throughput": {"enabled": asked}}, asked) for asked in (True, False)],
)
def test_the_synchronizing_timer_runs_only_if_requested(timers: Any, enabled: bool) -> None:
    config = {"train_micro_batch_size_per_gpu": 1} | ({} if timers is None else {"timers": timers})
    assert parse_ds_config(config).timers_config.enabled is enabled


# --- files that others publish

# transformers' documentation of DeepSpeed, ZeRO-3
HUGGING_FACE: dict[str, Any] = {
    "fp16": {
        "enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}  # fmt: skip
# LLaMA-Factory's ds_z3_config.json
LLAMA_FACTORY: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": HUGGING_FACE["fp16"],
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
FILLED_SIZES = {
    "reduce_bucket_size": 4096,
    "stage3_prefetch_bucket_size": 3686,
    "stage3_param_persistence_threshold": 640,
}


def test_llama_factorys_file_trains_with_lomo_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lomo_ds"):
        config = trained_on(LLAMA_FACTORY)
    assert config["optimizer"] == {
        "type": "LOMO",
        "params": {
            "lr": 0.03, "weight_decay": 0.0, "update_schedule": "auto", "stash_device": "auto", "rounding": "auto",
            "seed": 42, "gather_granularity": "auto", "accumulation": "auto", "weights": "auto",
        },
    }  # fmt: skip
    assert "optimizer: LOMO, as the DeepSpeed config names none" in caplog.text
    assert config["zero_optimization"] == LLAMA_FACTORY["zero_optimization"] | FILLED_SIZES
    assert (config["bf16"]["enabled"], config["fp16"]["enabled"], config["gradient_clipping"]) == (False, False, 1.0)


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_llama_factorys_file_trains_a_baseline_as_it_is(optim: str) -> None:
    assert trained_on(LLAMA_FACTORY, "--optim", optim)["optimizer"]["type"].lower() == optim


def test_hugging_faces_file_trains_adamw_as_it_is_and_says_what_lomo_wants() -> None:
    config = trained_on(HUGGING_FACE, "--optim", "adamw", "--bf16")
    assert config["optimizer"]["params"]["lr"] == config["scheduler"]["params"]["warmup_max_lr"] == 5e-5
    assert config["scheduler"]["params"]["warmup_num_steps"] == 0
    assert {name: config["zero_optimization"][name] for name in FILLED_SIZES} == FILLED_SIZES
    with pytest.raises(ConfigError, match=r"names the optimizer 'AdamW', .* write \"optimizer\": \{\"type\": \"LOMO\""):
        trained_on(HUGGING_FACE)
    adapted = HUGGING_FACE | {"optimizer": {"type": "LOMO", "params": {"lr": "auto"}}}
    with pytest.raises(ConfigError, match="offload_optimizer was asked for, but LOMO has no optimizer state"):
        trained_on(adapted)
    adapted["zero_optimization"] = HUGGING_FACE["zero_optimization"] | {"offload_optimizer": {"device": "none"}}
    assert trained_on(adapted)["optimizer"]["type"] == "LOMO"


def test_fp16_and_bf16_that_are_both_auto_follow_the_arguments() -> None:
    for argument in ("bf16", "fp16"):
        config = merged(LLAMA_FACTORY, f"--{argument}")[0]
        assert {name: config[name]["enabled"] for name in ("bf16", "fp16")} == {
            name: name == argument for name in ("bf16", "fp16")
        }
    assert trained_on(LLAMA_FACTORY | {"fp16": {"loss_scale": 0}})["fp16"] == {"loss_scale": 0, "enabled": False}


@pytest.mark.parametrize(
    ("model", "hidden"),
    [
        (LlamaConfig(hidden_size=32), 32),
        (GPT2Config(n_embd=48), 48),
        (SegformerConfig(hidden_sizes=[8, 16]), 16),
        (type("OfTextAndImages", (), {"text_config": LlamaConfig(hidden_size=96)}), 96),
    ],
)
def test_the_auto_sizes_are_those_of_hugging_faces_trainer(model: Any, hidden: int) -> None:
    config = {"zero_optimization": {"stage": 3, **dict.fromkeys(FILLED_SIZES, "auto")}}
    filled = fill_buckets(config, model)
    sizes = [hidden**2, int(0.9 * hidden**2), 10 * hidden]
    assert filled["zero_optimization"] == {"stage": 3, **dict(zip(FILLED_SIZES, sizes, strict=True))}
    pytest.importorskip("accelerate")
    expected = HfTrainerDeepSpeedConfig(config)
    arguments = SimpleNamespace(get_warmup_steps=lambda steps: 0)
    expected.trainer_config_finalize(arguments, SimpleNamespace(config=model), num_training_steps=10)
    assert expected.config["zero_optimization"] == filled["zero_optimization"]


# --- configs that come with lomo_ds


def test_the_default_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, _ = parse_arguments(REQUIRED)
    arguments.dump(tmp_path / "config.yaml")
    again, _ = parse_arguments(["--config", "config.yaml"])
    assert read_ds_config(again.deepspeed) == read_ds_config(str(ROOT / "ds_configs/zero3_bf16.json"))
    for path in SHIPPED:
        assert read_ds_config(path.stem) == read_ds_config(str(path))
    with pytest.raises(
        ConfigError, match=r"cannot be read: No such .* give the path of a JSON file, or one of zero3_au"
    ):
        read_ds_config("ds_configs/zero3_bf16.json")


def test_a_wheel_holds_the_configs(tmp_path: Path) -> None:
    code = "import setuptools; from setuptools.build_meta import build_wheel; build_wheel(__import__('sys').argv[1])"
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "lomo_ds"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=source, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"lomo_ds/ds_configs/{path.name}" for path in SHIPPED} <= set(names)
