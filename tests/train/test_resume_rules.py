"""Rules of a resume: a changed argument, field or scheduler takes effect from the first step, or is an error."""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, get_scheduler

from lomo_ds.checkpoint import Checkpoint, is_run_folder, open_checkpoint
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.parameter import base_type
from lomo_ds.engine.engine_state import capture_engine
from lomo_ds.engine.lomo import LomoEngine
from lomo_ds.errors import CheckpointError, LomoError
from lomo_ds.train.progress import Progress
from lomo_ds.train.resume import (
    RULES,
    check_fixed_arguments,
    check_same_model_function,
    log_changes,
    log_nothing_to_do,
    requested_checkpoint,
    resume_rule,
    rules_table,
)
from tests.engines import identical, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import tiny_model, whole_batch

GroupOf = Callable[..., Ranks]
ROOT = Path(__file__).parent.parent.parent
BASE = TrainArguments(model_name_or_path="m", train_file=["t.txt"], output_dir="out")
ARGUMENTS = [field.name for field in dataclasses.fields(TrainArguments)]
# a valid value that is not the default, where its type does not give one; and arguments that an argument needs
OTHER = {"warmup_ratio": 0.5, "max_seq_length": 8, "report_to": "none", "train_file_weights": [2.0]}
NEEDED: dict[str, dict[str, Any]] = {
    "activation_offload": {"gradient_checkpointing": True},
    "load_best_model_at_end": {"validation_file": ["v.txt"], "save_steps": 2, "eval_steps": 2},
}


def other_value(name: str) -> Any:
    """Return a valid value of an argument that is not its default."""
    value, hint = getattr(BASE, name), get_type_hints(TrainArguments)[name]
    if name in OTHER:
        return OTHER[name]
    choices = [choice for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        return next(choice for choice in choices if choice != value)
    if base_type(hint) is bool:
        return not value
    if base_type(hint) is str:
        return f"{value or ''}x"
    if get_origin(base_type(hint)) is list:
        return ["x"]
    return 7 if value is None else value + 1


def saved(folder: Path, arguments: TrainArguments = BASE, ds_config: dict[str, Any] | None = None) -> Checkpoint:
    """Write the files of a checkpoint that the rules read."""
    arguments.dump(folder / "config.yaml")
    (folder / "ds_config.json").write_text(json.dumps(ds_config or {}))
    return Checkpoint(folder, {})


# arguments


def test_the_docs_contain_the_rule_for_every_argument() -> None:
    assert set(RULES) <= set(ARGUMENTS)
    assert rules_table() in (ROOT / "docs/resume.md").read_text()


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_changed_argument_is_logged_or_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    before, now = getattr(BASE, name), other_value(name)
    assert before != now
    base = dataclasses.replace(BASE, **NEEDED.get(name, {}))
    changed = dataclasses.replace(base, **{name: now})
    if resume_rule(name) == "fixed":
        with pytest.raises(CheckpointError, match=rf"--{name} {now} \(saved: {before}\)"):
            check_fixed_arguments(saved(tmp_path, base).folder, changed)
        return
    check_fixed_arguments(saved(tmp_path, base).folder, changed)
    with caplog.at_level(logging.INFO, "lomo_ds"):
        log_changes(saved(tmp_path, base), changed, {})
    assert (f"--{name} {before} -> {now}" in caplog.text) == (resume_rule(name) != "ignored")


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_finished_run_warns_of_changed_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    before, now = getattr(BASE, name), other_value(name)
    base = dataclasses.replace(BASE, **NEEDED.get(name, {}))
    log_nothing_to_do(saved(tmp_path, base).folder, dataclasses.replace(base, **{name: now}), 3)
    assert (f"these have no effect: --{name} {before} -> {now}; to train" in caplog.text) == (
        resume_rule(name) != "ignored"
    )


@pytest.mark.parametrize("content", [b"seed: [", b"- seed", b"\xff", b""])
def test_a_finished_run_needs_no_readable_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with caplog.at_level(logging.INFO, "lomo_ds"):
        log_nothing_to_do(tmp_path, BASE, 3)
    assert caplog.messages == [f"nothing to do: the run of 3 steps is finished, and its model is in {tmp_path}"]


def test_nothing_is_logged_if_nothing_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Log nothing either about arguments that a library user's or an older checkpoint does not contain."""
    log_changes(saved(tmp_path, ds_config={"a": {"b": 1}}), BASE, {"a": {"b": 1}})
    log_changes(Checkpoint(tmp_path / "nowhere", {}), dataclasses.replace(BASE, seed=1), {"a": 1})
    check_fixed_arguments(tmp_path / "nowhere", dataclasses.replace(BASE, seed=1))
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\ntrain_file: t.txt\noutput_dir: out\n")
    check_fixed_arguments(tmp_path, BASE)
    log_nothing_to_do(tmp_path, BASE, 3)
    assert caplog.text == ""


def test_fields_of_the_deepspeed_config_are_logged_by_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = {"optimizer": {"params": {"lr": 1, "own": 2.0}}, "scheduler": {"type": "WarmupLR"}}
    now = {"optimizer": {"params": {"lr": 2, "own": 3.0}}, "fp16": {"loss_scale_window": 9}}
    with caplog.at_level(logging.INFO, "lomo_ds"):
        log_changes(saved(tmp_path, ds_config=before), BASE, now)
    assert caplog.messages == [
        f"changed since {tmp_path.name} was saved: fp16.loss_scale_window None -> 9, "
        "optimizer.params.own 2.0 -> 3.0, scheduler.type WarmupLR -> None"
    ], "lr is --learning_rate"


# the model


def test_another_model_function_is_an_error(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    (tmp_path / "model").mkdir()
    config.save_pretrained(tmp_path / "model")
    check_same_model_function(tmp_path, config)
    for harmless in ({"use_cache": False}, {"attention_dropout": 0.5}, {"dtype": "bfloat16"}):
        check_same_model_function(tmp_path, LlamaConfig(**{**config.to_dict(), **harmless}))
    for name, value in (
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("hidden_act", "relu"),
        ("rms_norm_eps", 1e-3),
        ("num_key_value_heads", 1),
    ):
        with pytest.raises(CheckpointError, match=rf"another config.json: {name} .* \(saved: .*\)"):
            check_same_model_function(tmp_path, LlamaConfig(**{**config.to_dict(), name: value}))


# values of --resume_from_checkpoint


def checkpoint(folder: Path) -> Path:
    (folder / "weights").mkdir(parents=True)
    (folder / "state.json").touch()
    return folder


@pytest.mark.parametrize("word", ["latest", "last", "true", "True"])
def test_words_for_the_newest_checkpoint(tmp_path: Path, word: str) -> None:
    arguments = dataclasses.replace(BASE, output_dir=str(tmp_path), resume_from_checkpoint=word)
    with pytest.raises(CheckpointError, match=f"{word} resumes from the newest .* there is none"):
        requested_checkpoint(arguments)
    checkpoint(tmp_path / "checkpoint-3")
    assert requested_checkpoint(arguments) == tmp_path


def test_words_for_no_checkpoint_and_paths(tmp_path: Path) -> None:
    def folder_for(word: str | None) -> Path | None:
        return requested_checkpoint(dataclasses.replace(BASE, output_dir=str(tmp_path), resume_from_checkpoint=word))

    assert [folder_for(word) for word in (None, "", "false", "None")] == [None] * 4
    assert folder_for("auto") == folder_for(f"{tmp_path}/") == tmp_path
    assert folder_for(f"{tmp_path}/checkpoint-3/") == tmp_path / "checkpoint-3"


def test_checkpoint_folders_and_run_folders(tmp_path: Path) -> None:
    assert not is_run_folder(checkpoint(tmp_path / "checkpoint-3"))
    assert is_run_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out/checkpoint-3/weights", "is a part of the checkpoint .*/out/checkpoint-3; give that folder"),
        ("out/checkpoint-3/state.json", "is a part of the checkpoint"),
        ("nowhere", "there is no checkpoint"),
        ("hf/checkpoint-5", "is a checkpoint of Hugging Face's Trainer, but lomo_ds reads only its own"),
        ("hf", "is an output folder of Hugging Face's Trainer"),
        ("ds/global_step5", "is a checkpoint of DeepSpeed's own engine"),
        ("ds", "is a checkpoint folder of DeepSpeed's own engine"),
        ("model", "is a model folder, .* give it to launch/train.py as --model_name_or_path"),
        ("model/config.json", "is a file; give the folder"),
        ("empty", "holds no checkpoint of lomo_ds"),
    ],
)
def test_the_error_names_the_kind_of_folder(tmp_path: Path, name: str, message: str) -> None:
    checkpoint(tmp_path / "out/checkpoint-3")
    for file in ("hf/checkpoint-5/trainer_state.json", "ds/global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt",
                 "model/config.json", "empty/a.txt"):  # fmt: skip
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=message):
        is_run_folder(tmp_path / name)


# metrics of another validation text


def test_losses_of_another_text_and_samples_of_another_prompt_are_dropped() -> None:
    progress = Progress(
        step=4, before={"eval_loss": 5.0}, evaluation={"eval_loss": 4.0}, evaluated_step=4, best=4.0, best_step=4,
        saved_step=4, held_out="a", prompt="b", sample_before="b c",
    )  # fmt: skip
    saved = dataclasses.asdict(progress)
    assert Progress.restored(saved, "a", "b", in_place=True) == progress
    assert Progress.restored(saved, "x", "b", in_place=True) == Progress(
        step=4, saved_step=4, held_out="x", prompt="b", sample_before="b c"
    )
    assert Progress.restored(saved, "a", "y", in_place=True).sample_before is None
    elsewhere = Progress.restored(saved, "a", "b", in_place=False)
    assert (elsewhere.best, elsewhere.saved_step, elsewhere.before) == (None, None, {"eval_loss": 5.0})
    del saved["held_out"], saved["prompt"]
    assert Progress.restored(saved, "a", "b", in_place=True) == progress, "an older checkpoint"


# the first step after a resume

Made = dict[str, Any]
LR, STEPS = 0.5, 3  # of the saved run


def scheduled(kind: str, total: int, warmup: int = 1) -> Made:
    """Return a scheduler of transformers, as launch/train.py passes it."""
    return {"lr_scheduler": lambda groups: get_scheduler(kind, groups, warmup, total)}


def section(kind: str, **params: Any) -> Made:
    """Return a scheduler section of the DeepSpeed config."""
    return {"scheduler": {"type": kind, "params": params}}


def rescheduled() -> dict[str, Made]:
    return {
        "as it was": scheduled("linear", 4),
        "more steps": scheduled("linear", 9),
        "longer warm-up": scheduled("linear", 9, warmup=6),
        "another type": scheduled("cosine", 4),
        "another rate": {"lr": 0.1, **scheduled("linear", 4)},
        "constant": scheduled("constant", 4),
        "WarmupLR": section("WarmupLR", warmup_max_lr=0.2, warmup_num_steps=8),
        "WarmupDecayLR": section("WarmupDecayLR", warmup_max_lr=0.2, warmup_num_steps=2, total_num_steps=9),
        "WarmupCosineLR": section("WarmupCosineLR", warmup_num_steps=2, total_num_steps=9),
        "OneCycle": section("OneCycle", cycle_min_lr=0.1, cycle_max_lr=0.3, cycle_first_step_size=4),
        "StepLR": section("StepLR", step_size=2, gamma=0.1),
        "none": {},
    }


def made(**more: Any) -> LomoEngine:
    return make_engine(tiny_model(), "stash", **{"lr": LR, **more})


def step(engine: LomoEngine, number: int) -> float:
    """Train on a batch, and return the learning rate of that step."""
    rate = float(engine.get_lr()[0])
    engine.train_batch(whole_batch(number, rows=2))
    return rate


def save(folder: str) -> None:
    engine = made(**scheduled("linear", 4))
    for number in range(STEPS):
        step(engine, number)
    engine.save_checkpoint(folder)


def resumed(folder: str, **more: Any) -> LomoEngine:
    """Return an engine resumed as launch/train.py does."""
    engine = made(**more)
    tensors = capture_engine(engine).tensors
    engine.restore(open_checkpoint(Path(folder) / f"checkpoint-{STEPS}", tensors))
    return engine


def rates(folder: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return the learning rates of two steps after a resume, and of a run that had the new arguments from the start."""
    save(folder)
    results = {}
    for name, more in rescheduled().items():
        whole, engine = made(**more), resumed(folder, **more)
        expected = [step(whole, number) for number in range(STEPS + 2)][STEPS:]
        results[name] = ([step(engine, number) for number in range(2)], expected)
    return results


def test_the_learning_rate_equals_that_of_a_run_with_the_new_arguments(ranks: GroupOf, tmp_path: Path) -> None:
    for name, (after_resume, expected) in ranks(1).run(rates, str(tmp_path))[0].items():
        assert after_resume == expected, name


CHANGED: dict[str, Made] = {
    "weight_decay": {"params": {"weight_decay": 0.3}},
    "gradient_clipping": {"global_norm": 0.01},
    "clip_grad_value": {"params": {"clip_grad_value": 1e-3}},
    "clip_group_norm": {"params": {"clip_group_norm": 1e-3}},
    "accumulation": {"accumulation": 2},
    "two_pass": {"params": {"update_schedule": "two_pass"}},
    "persistence": {"threshold": 0},
}


def first_steps(folder: str) -> dict[str, tuple[bool, bool]]:
    """Return whether a resumed step equals that of a new run from the same weights, and whether it has changed."""
    save(folder)
    unchanged = resumed(folder)
    step(unchanged, 9)
    results = {}
    for name, more in CHANGED.items():
        new_run, engine = made(**more), resumed(folder, **more)
        new_run.load_checkpoint(folder, load_module_only=True)
        assert new_run.global_steps == 0
        step(new_run, 9)
        step(engine, 9)
        weights = weights_of(engine)
        results[name] = (identical(weights, weights_of(new_run)), not identical(weights, weights_of(unchanged)))
    return results


def test_changed_settings_take_effect_from_the_first_step(ranks: GroupOf, tmp_path: Path) -> None:
    results = ranks(1).run(first_steps, str(tmp_path))[0]
    assert [name for name, (as_new_run, _) in results.items() if not as_new_run] == []
    unaffected = [name for name, (_, differs) in results.items() if not differs]
    assert unaffected == ["accumulation", "two_pass", "persistence"], "these compute the same step"


def loss_scales(folder: str) -> dict[str, float]:
    """Return loss scales before and after a resume."""
    get_accelerator().is_fp16_supported = lambda: True
    dynamic = {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 1, "hysteresis": 1}
    fixed = {"enabled": True, "loss_scale": 8.0}
    results = {}
    for name, fp16 in (("dynamic", dynamic), ("fixed", fixed)):
        engine = made(fp16=fp16)
        for number in range(STEPS):
            step(engine, number)
        engine.save_checkpoint(f"{folder}/{name}")
        results[name] = engine.cur_scale
    results["dynamic resumed"] = resumed(f"{folder}/dynamic", fp16=dynamic | {"initial_scale_power": 5}).cur_scale
    results["dynamic to fixed"] = resumed(f"{folder}/dynamic", fp16=fixed | {"loss_scale": 2.0}).cur_scale
    results["fixed to another fixed"] = resumed(f"{folder}/fixed", fp16=fixed | {"loss_scale": 4.0}).cur_scale
    results["fixed to dynamic"] = resumed(f"{folder}/fixed", fp16=dynamic).cur_scale
    return results


def test_a_dynamic_loss_scale_is_restored_and_a_fixed_one_is_the_configs(ranks: GroupOf, tmp_path: Path) -> None:
    results = ranks(1).run(loss_scales, str(tmp_path))[0]
    assert results["dynamic resumed"] == results["dynamic"] > 2.0**5
    assert (results["dynamic to fixed"], results["fixed to another fixed"], results["fixed to dynamic"]) == (
        2.0,
        4.0,
        16.0,
    )


# DeepSpeed's keyword arguments of load_checkpoint


def loaded_in_parts(folder: str) -> list[str]:
    """Load parts of a checkpoint, and return the warnings and error messages."""
    save(folder)
    messages: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logging.getLogger("lomo_ds").addHandler(listener := Listener(logging.WARNING))
    linear = {"lr_scheduler": lambda groups: torch.optim.lr_scheduler.LinearLR(groups, 0.5)}
    own = made(**linear)
    own.load_checkpoint(folder, load_lr_scheduler_states=False)
    assert (own.global_steps, own.get_lr()[0]) == (STEPS, LR * 0.5)
    same = made(**scheduled("linear", 4))
    same.load_checkpoint(folder)
    assert messages == []
    base = made(lr=0.1, **scheduled("linear", 4))
    base.load_checkpoint(folder)
    longer = made(**scheduled("linear", 9))
    longer.load_checkpoint(folder)
    assert longer.get_lr()[0] == LR * (9 - STEPS) / 8, "the first step has the rate of its own scheduler"
    for wrong in ({}, {"load_module_strict": False}, {"custom_load_fn": print}):
        with pytest.raises(LomoError) as error:
            made(**linear).load_checkpoint(folder, **wrong)
        messages.append(str(error.value))
    logging.getLogger("lomo_ds").removeHandler(listener)
    return messages


def test_deepspeed_s_keyword_arguments(ranks: GroupOf, tmp_path: Path) -> None:
    replaced, another, strict, custom = ranks(1).run(loaded_in_parts, str(tmp_path))[0]
    assert "is restored, which replaces base_lrs [0.1] by [0.5]; load_lr_scheduler_states=False keeps" in replaced
    assert "saved with the learning-rate scheduler LambdaLR, but this run has LinearLR" in another
    assert "load_module_strict False is not supported" in strict
    assert "custom_load_fn is not supported" in custom


def replaced_by_a_save(folder: str) -> list[str]:
    engine = made()
    messages = []
    for tag in ("model", "note.txt", "a/b", ".."):
        with pytest.raises(CheckpointError) as error:
            engine.save_checkpoint(folder, tag)
        messages.append(str(error.value))
    engine.save_checkpoint(folder, "empty")
    engine.save_checkpoint(folder, "empty")
    return messages


def test_a_save_replaces_only_a_checkpoint(ranks: GroupOf, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "note.txt").touch()
    (tmp_path / "empty").mkdir()
    model, note, nested, parent = ranks(1).run(replaced_by_a_save, str(tmp_path))[0]
    assert "a checkpoint may only replace another checkpoint, but" in model
    assert f"{tmp_path}/note.txt is not one" in note
    assert "tag must be the name of one folder in save_dir, got 'a/b'" in nested
    assert "got '..'" in parent
    assert (tmp_path / "model/config.json").read_text() == "{}"
    assert (tmp_path / "empty/state.json").exists()
