"""The ds_config and the command line made one."""

import json
from pathlib import Path
from typing import Any

import pytest

from lomo_ds.arguments import TrainArguments, parse_arguments
from lomo_ds.config import refuse_what_cannot_be, refuse_what_no_baseline_can
from lomo_ds.ds_config import fill_scheduler, read_ds_config, reconcile
from lomo_ds.ds_parse import parse_ds_config
from lomo_ds.errors import ConfigError

SHIPPED = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))
REQUIRED = ["--model_name_or_path", "m", "--train_file", "t.txt", "--output_dir", "o"]


def merged(config: dict[str, Any], *argv: str, world_size: int = 2) -> tuple[dict[str, Any], TrainArguments]:
    arguments, given = parse_arguments([*REQUIRED, *argv])
    return reconcile(config, arguments, given, world_size)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_config_fills_up_and_passes(path: Path) -> None:
    config, arguments = merged(read_ds_config(str(path)), "--learning_rate", "0.5")
    config = fill_scheduler(config, arguments, total_steps=10)
    assert config["optimizer"]["params"]["lr"] == 0.5
    assert config["gradient_clipping"] == 1.0
    assert config["train_batch_size"] == 16
    refuse_what_cannot_be(config)


def test_an_argument_not_given_takes_the_ds_configs_value() -> None:
    config = {"bf16": {"enabled": True}, "gradient_clipping": 0.5, "optimizer": {"params": {"lr": 0.7}}}
    _, arguments = merged(config)
    assert (arguments.bf16, arguments.max_grad_norm, arguments.learning_rate) == (True, 0.5, 0.7)


def test_a_field_that_is_absent_takes_the_argument_or_means_what_deepspeed_means() -> None:
    config, arguments = merged({})
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert (config["gradient_clipping"], arguments.max_grad_norm) == (0.0, 0.0)
    assert merged({}, "--max_grad_norm", "2")[0]["gradient_clipping"] == 2.0


@pytest.mark.parametrize(
    "params", [{"clip_group_norm": 1.0}, {"clip_grad_value": 1.0}, {"update_schedule": "immediate"}]
)
def test_the_default_clip_gives_way_to_what_was_asked_for(params: dict[str, Any]) -> None:
    config = {"gradient_clipping": "auto", "optimizer": {"params": params}}
    merged_config, arguments = merged(config)
    assert (merged_config["gradient_clipping"], arguments.max_grad_norm) == (0.0, 0.0)
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
    ("config", "argv", "sentence"),
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
def test_disagreements_name_both_sides(config: dict[str, Any], argv: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
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
    refuse_what_no_baseline_can(config)
    assert merged(config, "--optim", optim)[0] == config, "which is its own place too"
    assert given["optimizer"]["type"] == "LOMO", "the caller's own is untouched"


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ({"type": "LOMO", "params": {"update_schedule": "stash"}}, "lr and weight_decay, got update_schedule too"),
        (
            {"type": "LOMO", "params": {"clip_group_norm": 1.0, "stash_device": "cpu"}},
            "got clip_group_norm and stash_device too; remove that, or use --optim lomo",
        ),
        ({"params": {"clip_grad_value": 1.0}}, "got clip_grad_value too"),
        ({"type": "AdamW", "params": {"betas": [0.9, 0.95]}}, "got betas too"),
        ({"type": "Muon"}, "takes the place of LOMO .*, got optimizer.type 'Muon'; write LOMO or AdamW"),
    ],
)
def test_what_means_nothing_to_a_baseline(optimizer: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        merged({"optimizer": optimizer}, "--optim", "adamw")
    unset = {"update_schedule": "auto", "clip_grad_value": None, "rounding": "stochastic"}
    merged({"optimizer": {"type": "LOMO", "params": unset}}, "--optim", "adamw")


def test_an_auto_that_stands_for_nothing() -> None:
    config, arguments = merged({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}})
    with pytest.raises(ConfigError, match=r"zero_optimization\.reduce_bucket_size; give a value"):
        fill_scheduler(config, arguments, total_steps=1)


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
def test_the_timer_that_waits_for_the_device_runs_only_where_it_is_asked_for(timers: Any, enabled: bool) -> None:
    config = {"train_micro_batch_size_per_gpu": 1} | ({} if timers is None else {"timers": timers})
    assert parse_ds_config(config).timers_config.enabled is enabled
