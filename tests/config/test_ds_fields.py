"""A field of a DeepSpeed config means the same to whoever reads it, also where it is absent."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import given, settings
from hypothesis import strategies as st

import lomo_ds
from lomo_ds.config.ds_fields import TOP_LEVEL_FIELDS, complete_ds_config
from lomo_ds.config.validation import unused_fields, validate_ds_config
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.errors import ConfigError
from lomo_ds.planner import settings_of
from lomo_ds.update.clipping import Clipping
from lomo_ds.zero3 import offload_device
from tests.engines import largest_difference, weights_of
from tests.reference import PlainSGD, even_batch, tiny_model

LARGE = 1e6  # a limit that no gradient here reaches


def ds_config(params: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "LOMO", "params": {"lr": 0.5, "rounding": "nearest", **(params or {})}},
        **sections,
    }


def settled(params: dict[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """Return the config that ``lomo_ds.initialize`` accepts, completed."""
    config = complete_ds_config(ds_config(params, **sections), world_size=1)
    validate_ds_config(config)
    parse_ds_config(config)
    return config


# --- gradient_clipping


@pytest.mark.parametrize(
    ("params", "reference"),
    [
        ({}, {}),
        ({"update_schedule": "immediate"}, {}),
        ({"update_schedule": "two_pass"}, {}),
        ({"update_schedule": "stash"}, {}),
        ({"clip_group_norm": LARGE}, {}),
        ({"clip_group_norm": LARGE, "update_schedule": "immediate"}, {}),
        ({"clip_grad_value": 0.05}, {"value": 0.05}),
    ],
)
@pytest.mark.parametrize("absent", [{}, {"gradient_clipping": None}], ids=["absent", "null"])
def test_without_gradient_clipping_nothing_is_clipped(
    params: dict[str, Any], reference: dict[str, Any], absent: dict[str, Any], ranks: Any
) -> None:
    plain = tiny_model()
    _, norm = PlainSGD(plain, lr=0.5, **reference).step(even_batch(0, 2))
    assert norm > 1.5, "so that DeepSpeed's default of 1 would show"
    [weights] = ranks(1).run(weights_after_a_step, ds_config(params, **absent))
    assert largest_difference(weights, plain) < 1e-5


def weights_after_a_step(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    engine = lomo_ds.initialize(model=tiny_model(), config=config)[0]
    engine.train_batch(even_batch(0, 2))
    weights = weights_of(engine)
    engine.destroy()
    return weights


@pytest.mark.parametrize(
    ("clipping", "words"),
    [
        (Clipping(), "none"),
        (Clipping(global_norm=1.0), "the global gradient norm to 1 (gradient_clipping)"),
        (Clipping(group_norm=0.5), "each layer's gradient norm to 0.5 (clip_group_norm)"),
        (Clipping(value=2.0), "each gradient element to 2 (clip_grad_value)"),
    ],
)
def test_the_log_says_what_is_clipped(clipping: Clipping, words: str) -> None:
    assert str(clipping) == words


# --- read raw and read parsed

sizes = st.sampled_from([1, 2, 4])
fields = st.fixed_dictionaries(
    {},
    optional={
        "gradient_clipping": st.sampled_from([None, 0, 0.0, 0.5, 2]),
        "gradient_accumulation_steps": st.none() | sizes | st.just(2.0),
        "train_batch_size": st.none() | st.sampled_from([4, 8, 16]),
        "train_micro_batch_size_per_gpu": st.none() | sizes,
        "bf16": st.sampled_from([{}, {"enabled": True}, {"enabled": False}]),
        "bfloat16": st.sampled_from([{}, {"enabled": True}]),
        "fp16": st.sampled_from([{}, {"enabled": True, "loss_scale": 0}, {"enabled": True, "loss_scale": 8}]),
    },
)
zero_fields = st.fixed_dictionaries(
    {"stage": st.just(3)},
    optional={
        "prefetch_bucket_size": st.sampled_from([0, 1e6, 10]),
        "stage3_prefetch_bucket_size": st.sampled_from([5, 2e6]),
        "max_live_parameters": st.sampled_from([7, 1e9]),
        "stage3_max_reuse_distance": st.sampled_from([8, 1e9]),
        "param_persistence_threshold": st.sampled_from([9, 1e5]),
        "reduce_bucket_size": st.sampled_from([11, 5e8]),
        "offload_param": st.sampled_from([None, {}, {"device": "none"}, {"device": "cpu"}]),
    },
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(fields, zero_fields)
def test_the_dict_agrees_with_deepspeeds_parsed_config(top: dict[str, Any], zero: dict[str, Any]) -> None:
    config = {"zero_optimization": zero, "optimizer": {"type": "LOMO", "params": {"lr": 0.5}}, **top}
    try:
        config = complete_ds_config(config, world_size=1)
        parsed = parse_ds_config(config)
    except ConfigError:
        return
    assert complete_ds_config(config, world_size=1) == config, "nothing is left to complete_ds_config"
    for name in (
        "gradient_clipping",
        "gradient_accumulation_steps",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
    ):
        assert config[name] == getattr(parsed, name)
    planned = settings_of(config)
    assert planned.accumulation_steps == parsed.gradient_accumulation_steps
    assert planned.gradient_clipping == parsed.gradient_clipping
    halves = {"bf16": parsed.bfloat16_config.enabled, "fp16": parsed.float16_config.enabled}
    assert planned.precision == next((name for name, enabled in halves.items() if enabled), "fp32")
    assert (
        planned.offload_param == offload_device(config) == getattr(parsed.zero_config.offload_param, "device", "none")
    )
    for setting, field in (
        ("persistence_threshold", "param_persistence_threshold"),
        ("prefetch_bucket_size", "prefetch_bucket_size"),
        ("max_live_parameters", "max_live_parameters"),
        ("max_reuse_distance", "max_reuse_distance"),
        ("reduce_bucket_size", "reduce_bucket_size"),
    ):
        assert getattr(planned, setting) == getattr(parsed.zero_config, field)


def test_accumulation_that_deepspeed_derives_is_seen() -> None:
    assert settled(train_batch_size=4)["gradient_accumulation_steps"] == 4
    with pytest.raises(ConfigError, match=r"immediate keeps no gradients, .* gradient_accumulation_steps 4"):
        settled({"update_schedule": "immediate", "accumulation": "stash"}, train_batch_size=4)
    with pytest.raises(ConfigError, match=r"train_batch_size 7 .* is not .* 2 x gradient_accumulation_steps 3 x 1 GPU"):
        settled(train_batch_size=7, train_micro_batch_size_per_gpu=2)


def test_each_name_that_deepspeed_reads_is_known() -> None:
    read: set[str] = set()

    class Recorder(dict[str, Any]):
        def get(self, key: Any, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

        def __contains__(self, key: Any) -> bool:
            read.add(key)
            return super().__contains__(key)

        def keys(self) -> Any:
            return self

    DeepSpeedConfig(Recorder(ds_config()))
    assert {"train_batch_size", "wall_clock_breakdown", "aio", "bfloat16"} < read
    assert read - set(TOP_LEVEL_FIELDS) == {"bfloat16"}, "DeepSpeed reads names that lomo_ds would call unknown"


# --- names and kinds


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gradient_cliping": 1.0}, "knows no 'gradient_cliping' in its config; did you mean 'gradient_clipping'"),
        ({"gradient_accumulation_step": 2}, "did you mean 'gradient_accumulation_steps'"),
        ({"zero_optimisation": {"stage": 3}}, "did you mean 'zero_optimization'"),
        ({"optimizer": {"type": "LOMO", "param": {"lr": 1}}}, '"optimizer" .* has no field \'param\'; did you mean'),
        ({"scheduler": {"type": "WarmupLR", "warmup_num_steps": 3}}, "no field 'warmup_num_steps'; it knows type, par"),
        ({"bf16": {"enabled": True}, "bfloat16": {}}, "bfloat16 and bf16 are two names of one field .*; keep bf16"),
        (
            {"zero_optimization": {"stage": 3, "max_live_parameters": 1, "stage3_max_live_parameters": 2}},
            "max_live_parameters and stage3_max_live_parameters of zero_optimization are two names of one field",
        ),
        ({"zero_optimization": {"stage": 3, "cpu_offload": True}}, 'cpu_offload is an old name; write "offload_opti'),
        ({"zero_optimization": {"stage": 3, "cpu_offload_param": True}}, 'write "offload_param": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "5e8"}}, "must be an integer, got '5e8'"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": 0.5}}, "must be an integer, got 0.5"),
        ({"zero_optimization": {"stage": 3, "overlap_comm": "false"}}, "overlap_comm .* must be true or false, got"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "no"}}},
         "zero_optimization.offload_param.pin_memory .* must be true or false, got 'no'"),
        ({"bf16": {"enabled": "false"}}, "bf16.enabled .* must be true or false, got 'false'"),
        ({"fp16": {"enabled": True, "loss_scale": "0"}}, "fp16.loss_scale .* must be a number, got '0'"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping .* must be a number, got '1.0'"),
        ({"gradient_clipping": True}, "gradient_clipping .* must be a number, got True"),
        ({"train_batch_size": "8"}, "train_batch_size .* must be an integer, got '8'"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be an integer of at least 1, got 0"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is not supported, as all ranks are data-parallel"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency.enabled is not supported"),
        ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled is not supported"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile is not supported"),
        ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled is not supported"),
        ({"weight_quantization": {"quantized_initialization": {"num_bits": 4}}}, "weight_quantization is not"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is not supported"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "grad_accum_dtype bf16 is not supported; remove"),
        ({"data_types": {"keep_in_fp32_modules": ["norm"]}}, "keep_in_fp32_modules .* weights have one precision"),
        ({"bf16": {"enabled": True}, "data_types": {"param_dtype": "fp16"}}, "param_dtype must be bf16, .*got fp16"),
        ({"data_types": {"buffer_dtype": "fp7"}}, "'fp7' is not a valid DtypeEnum"),
        ({"amp": {"enabled": True}}, "AMP integration has been removed"),
        ({"curriculum_learning": {"enabled": True}}, "'curriculum_learning' has been removed"),
    ],
)  # fmt: skip
def test_fields_that_deepspeed_ignores_are_an_error(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        settled(**sections)
    assert "\n" not in str(refusal.value)


def test_old_names_and_aliases_become_current_names() -> None:
    zero = {"stage": 3, "prefetch_bucket_size": 1e6, "stage3_gather_fp16_weights_on_model_save": True}
    config = settled(bfloat16={"enabled": True}, zero_optimization=zero, train_batch_size=1.0)
    assert config["bf16"] == {"enabled": True}
    assert "bfloat16" not in config
    assert type(config["train_batch_size"]) is int
    assert config["zero_optimization"] == {
        "stage": 3,
        "stage3_prefetch_bucket_size": 1_000_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert "stage3_gather_fp16_weights_on_model_save" in zero, "the caller's own is untouched"


def test_an_unknown_field_is_logged_and_removed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lomo_ds"):
        config = settled(_comment="from a colleague")
    assert "_comment" not in config
    assert caplog.messages == ["DeepSpeed knows no '_comment' in its config, so it is ignored"]


def test_what_accelerate_writes_passes() -> None:
    nowhere = {"device": "none", "nvme_path": None}
    zero = {"stage": 3, "offload_optimizer": nowhere, "offload_param": nowhere}
    settled(steps_per_print=float("inf"), zero_allow_untested_optimizer=True, zero_optimization=zero)


def test_what_only_deepspeeds_optimizers_read_is_named() -> None:
    assert unused_fields(settled()) == []
    asked = settled(zero_allow_untested_optimizer=True, bf16={"enabled": True, "check_grad_overflow": False})
    assert unused_fields(asked) == ["zero_allow_untested_optimizer", "bf16.check_grad_overflow"]


@pytest.mark.parametrize(
    ("text", "message"), [(None, "cannot be read"), ("{,}", "cannot be read"), ("[1]", "got list")]
)
def test_an_invalid_config_is_an_error(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ds_config.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"the DeepSpeed config .*ds_config.json .*{message}"):
        lomo_ds.initialize(model=torch.nn.Linear(1, 1), config=str(file))


# --- "auto"


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"bf16": {"enabled": "auto"}}, r"bf16\.enabled \(write true or false\)"),
        ({"fp16": {"enabled": "auto"}}, r"fp16\.enabled \(write true or false\)"),
        ({"gradient_clipping": "auto"}, r"gradient_clipping \(write a number\)"),
        ({"train_batch_size": "auto"}, r"train_batch_size \(write an integer\)"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, r"reduce_bucket_size \(write an integer\)"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "auto"}}}, r"param\.device \(write a v"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}}, r"params\.cycle_min_lr \("),
        ({"optimizer": {"type": "LOMO", "params": {"lr": "auto"}}}, r"optimizer\.params\.lr \(write a value\)"),
        ({"csv_monitor": {"enabled": True, "tags": [{"job": "auto"}]}}, r"csv_monitor\.tags\.job \("),
    ],
)  # fmt: skip
def test_an_auto_without_a_value_is_an_error(sections: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f'"auto" in the DeepSpeed config has no value here in .*{named}'):
        lomo_ds.initialize(model=torch.nn.Linear(1, 1), config=ds_config(**sections))


def test_the_autos_of_lomo_are_values() -> None:
    autos = dict.fromkeys(("update_schedule", "stash_device", "rounding", "gather_granularity", "weights"), "auto")
    settled(autos, data_types={"keep_in_fp32_modules": "auto"})
