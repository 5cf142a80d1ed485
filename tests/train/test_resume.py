"""launch/train.py stopped and started again: the weights and the log lines of a run that never stopped."""

import contextlib
import errno
import io
import json
import logging
import math
import os
import runpy
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.faults import demo_with_dropout
from lomo_ds.checkpoint import list_checkpoints, open_in_one_process, save
from lomo_ds.engine import build
from lomo_ds.engine.lomo import LomoEngine
from lomo_ds.errors import LomoError
from lomo_ds.train import loop
from tests.checkpoint.test_engine_checkpoints import DAMAGE
from tests.disks import mounted
from tests.launching import ROOT, demo_arguments, run_main
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
TIMES = ("tokens_per_second", "tokens_per_second_per_gpu")


@pytest.fixture(scope="module")
def dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model with dropout, and texts short enough for several epochs."""
    folder = demo_with_dropout(tmp_path_factory.mktemp("dropout"))
    for name, lines in (("train.txt", 40), ("validation.txt", 10)):
        (folder / name).write_text("\n".join((folder / name).read_text().splitlines()[:lines]))
    return folder


@pytest.fixture(scope="module")
def fp16_in_motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An fp16 config whose loss scale overflows at first and grows every other step."""
    config = json.loads((ROOT / "ds_configs/zero3_fp16.json").read_text())
    config["fp16"] |= {"initial_scale_power": 20, "loss_scale_window": 2}
    file = tmp_path_factory.mktemp("config") / "fp16.json"
    file.write_text(json.dumps(config))
    return file


def arguments(folder: Path, out: Path, **more: Any) -> list[str]:
    defaults: dict[str, Any] = {
        "validation_file": folder / "validation.txt", "deepspeed": ROOT / "ds_configs/zero3_fp32.json",
        "gradient_accumulation_steps": 2, "learning_rate": 0.5, "num_train_epochs": 2, "logging_steps": 2,
        "eval_steps": 3, "warmup_ratio": 0.2, "sample_prompt": "One day", "sample_tokens": 2,
    }  # fmt: skip
    return demo_arguments(folder, out, **defaults | more)


def run_signalled(argv: list[str], signals: dict[tuple[int, int], str]) -> tuple[int, str, str]:
    """launch/train.py, in which rank r receives a signal behind its n-th training step; ``signals`` by (r, n)."""
    get_accelerator().is_fp16_supported = lambda: True
    train_batch, calls = LomoEngine.train_batch, iter(range(1, 10**6))

    def signalled(engine: LomoEngine, batch: Any) -> Any:
        loss = train_batch(engine, batch)
        name = signals.get((int(os.environ["RANK"]), next(calls)))
        if name:
            os.kill(os.getpid(), getattr(signal, name))
        return loss

    LomoEngine.train_batch = signalled  # type: ignore[assignment, method-assign]
    try:
        return run_main(argv)
    finally:
        LomoEngine.train_batch = train_batch  # type: ignore[method-assign]


def run(ranks: Ranks, argv: list[str], signals: dict[tuple[int, int], str] | None = None) -> str:
    """Return the output of rank 0; every rank must have exited with status 0."""
    results = ranks.run(run_signalled, argv, signals or {})
    assert [status for status, _, _ in results] == [0] * ranks.world_size, results
    return results[0][1] + results[0][2]


def run_listening(argv: list[str]) -> tuple[int, str]:
    """launch/train.py; its exit status, and what it logs."""
    log = io.StringIO()
    logging.getLogger("lomo_ds").addHandler(handler := logging.StreamHandler(log))
    try:
        return run_main(argv)[0], log.getvalue()
    finally:
        logging.getLogger("lomo_ds").removeHandler(handler)


def logged(ranks: Ranks, argv: list[str]) -> str:
    """Return the log of rank 0; every rank must have exited with status 0."""
    results = ranks.run(run_listening, argv)
    assert [status for status, _ in results] == [0] * ranks.world_size, results
    return results[0][1]


def records(out: Path) -> list[dict[str, Any]]:
    """The log lines without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert records(one) == records(other)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stopped_twice_by_signals_and_resumed(
    ranks: GroupOf, dropout: Path, fp16_in_motion: Path, tmp_path: Path, precision: str
) -> None:
    """In the middle of an epoch, by either signal, to either rank, in the step of a log line and of an evaluation."""
    more = {"deepspeed": fp16_in_motion if precision == "fp16" else ROOT / "ds_configs/zero3_bf16.json"}
    run(ranks(2), arguments(dropout, tmp_path / "whole", **more))
    argv = [*arguments(dropout, tmp_path / "stopped", **more), "--resume_from_checkpoint=auto"]
    said = run(ranks(2), argv, {(1, 5): "SIGUSR1"})
    assert "after step 5: " in said
    assert "checkpoint-5 is saved; resume with --resume_from_checkpoint auto" in said
    assert not (tmp_path / "stopped/model.safetensors").exists()
    assert "stopped by SIGTERM after step 9" in run(ranks(2), argv, {(0, 4): "SIGTERM"})
    assert "resumed after step 9 of " in run(ranks(2), argv)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    scales = {record["loss_scale"] for record in records(tmp_path / "whole")[1:] if "loss_scale" in record}
    assert (len(scales) > 2) == (precision == "fp16")


def test_adalomo_stopped_resumed_and_exported(ranks: GroupOf, dropout: Path, tmp_path: Path) -> None:
    """The statistics are restored with the weights, and no other optimizer takes them for its own."""
    more = {
        "optim": "adalomo",
        "learning_rate": 0.05,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "save_steps": 6,
    }
    run(ranks(2), arguments(dropout, tmp_path / "whole", **more))
    losses = [record["eval_loss"] for record in records(tmp_path / "whole") if "eval_loss" in record]
    assert losses[-1] < losses[0] - 0.3
    argv = [*arguments(dropout, tmp_path / "stopped", **more), "--resume_from_checkpoint=auto"]
    assert "checkpoint-3 is saved" in run(ranks(2), argv, {(1, 3): "SIGTERM"})
    from_checkpoint = f"--resume_from_checkpoint={tmp_path}/stopped/checkpoint-3"
    assert "--optim lomo (saved: adalomo)" in refused(ranks(2), [*argv, "--optim=lomo", from_checkpoint])
    assert "resumed after step 3 of 6" in run(ranks(2), argv)
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    export(tmp_path / "stopped/checkpoint-6", tmp_path / "exported")
    model, exported = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stopped", "exported"))
    assert all(torch.equal(model[name], exported[name]) for name in model)


def test_killed_between_checkpoints_what_follows_is_done_again(ranks: GroupOf, dropout: Path, tmp_path: Path) -> None:
    """metrics.jsonl tells of steps behind the checkpoint, and its last line was cut short."""
    run(ranks(2), arguments(dropout, tmp_path / "whole", max_steps=8))
    argv = arguments(dropout, tmp_path / "killed", max_steps=8, save_steps=4, async_save=True)
    run(ranks(2), argv, {(0, 7): "SIGTERM"})
    shutil.rmtree(tmp_path / "killed/checkpoint-7")
    with (tmp_path / "killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    (tmp_path / "killed/checkpoint-6.partial").mkdir()
    assert "resumed after step 4 of 8" in run(ranks(2), [*argv, "--resume_from_checkpoint=auto"])
    assert_same(tmp_path / "whole", tmp_path / "killed")
    assert [folder.name for folder in list_checkpoints(tmp_path / "killed")] == ["checkpoint-4", "checkpoint-8"]
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_another_number_of_ranks_sees_the_rest_of_the_epoch(ranks: GroupOf, dropout: Path, tmp_path: Path) -> None:
    argv = arguments(dropout, tmp_path, num_train_epochs=1, logging_steps=1, per_device_train_batch_size=1)
    argv.append("--resume_from_checkpoint=auto")
    for world_size, count in ((4, 2), (2, 2), (1, 2)):
        run(ranks(world_size), argv, {(0, count): "SIGUSR1"})
    assert "was saved by 1 ranks on cpu and resumes with 3 on cpu" in run(ranks(3), argv)
    epochs = [record["epoch"] for record in records(tmp_path) if "epoch" in record]
    blocks = math.ceil(records(tmp_path)[-1]["tokens"] / 32)  # the last one is padded, and padding is not counted
    per_step = [round(blocks * (after - before)) for before, after in zip([0.0, *epochs], epochs, strict=False)]
    assert per_step[:6] == [8, 8, 4, 4, 2, 2]
    assert sum(per_step) == blocks
    assert epochs[-1] == 1.0


# which checkpoints are kept, and which is exported


def evaluations(losses: list[float]) -> Callable[..., float]:
    actual = iter(losses)
    return lambda *arguments: next(actual)


def run_with_losses(argv: list[str], losses: list[float]) -> tuple[int, str, str]:
    """launch/train.py, in which the held-out losses are these."""
    evaluate_loss, loop.evaluate_loss = loop.evaluate_loss, evaluations(losses)
    try:
        return run_main(argv)
    finally:
        loop.evaluate_loss = evaluate_loss


@pytest.mark.parametrize("async_save", [False, True])
def test_old_checkpoints_go_and_the_best_is_exported(
    ranks: GroupOf, dropout: Path, tmp_path: Path, async_save: bool
) -> None:
    argv = arguments(
        dropout, tmp_path, max_steps=12, save_steps=2, eval_steps=2, save_total_limit=2, load_best_model_at_end=True,
        async_save=async_save,
    )  # fmt: skip
    results = ranks(2).run(run_with_losses, argv, [9.0, math.nan, 4.0, 6.0, 7.0, 7.5, 8.0])
    assert results[0][0] == 0, results
    assert "best model: checkpoint-4, held-out loss 4.0000" in results[0][1]
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-12"]
    export(tmp_path / "checkpoint-4", tmp_path / "exported")
    best, exported = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "exported"))
    assert all(torch.equal(best[name], exported[name]) for name in best)


def export(checkpoint: Path, folder: Path, *more: str) -> str:
    """launch/export.py; what it says."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("error")
        argv = ["--checkpoint", str(checkpoint), "--output_dir", str(folder), *more]
        status = runpy.run_path(str(ROOT / "launch/export.py"))["main"](argv)
    assert (status == 0) == ("error: " not in err.getvalue())
    return err.getvalue()


# how it says no


@pytest.fixture(scope="module")
def two_saved(ranks: GroupOf, dropout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output_dir with checkpoints 2 and 4 of a run of 4 steps."""
    out = tmp_path_factory.mktemp("two")
    run(ranks(2), arguments(dropout, out, max_steps=4, save_steps=2))
    return out


def refused(ranks: Ranks, argv: list[str]) -> str:
    """Return the error message of a job that ends at once."""
    results = ranks.run(run_main, argv)
    assert [status for status, _, _ in results] == [2] * ranks.world_size, results
    errors = [line for _, _, err in results for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, results
    return errors[0] + results[0][2]


def test_an_output_dir_with_checkpoints_is_not_begun_anew(ranks: GroupOf, dropout: Path, two_saved: Path) -> None:
    said = refused(ranks(2), arguments(dropout, two_saved, max_steps=4))
    assert "contains checkpoint-4 of another run; resume from it with --resume_from_checkpoint auto" in said


def test_a_finished_run_is_not_run_again(ranks: GroupOf, dropout: Path, two_saved: Path) -> None:
    before = (two_saved / "model.safetensors").stat().st_mtime_ns
    said = run(ranks(2), [*arguments(dropout, two_saved, max_steps=4), "--resume_from_checkpoint=auto"])
    assert "resumed" not in said
    assert (two_saved / "model.safetensors").stat().st_mtime_ns == before


def test_a_run_is_made_longer(ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path) -> None:
    shutil.copytree(two_saved, copy := tmp_path / "copy")
    argv = arguments(dropout, copy, max_steps=6, logging_steps=1, learning_rate=0.1)
    said = logged(ranks(2), [*argv, f"--resume_from_checkpoint={copy}/"])
    assert "changed since checkpoint-4 was saved: --learning_rate 0.5 -> 0.1, --max_steps 4 -> 6" in said
    rates = {record["step"]: record["learning_rate"] for record in records(copy) if "learning_rate" in record}
    assert [rates[5], rates[6]] == pytest.approx([0.1 * 2 / 5, 0.1 * 1 / 5]), "of a run of 6 steps, 1 of them warm-up"
    assert yaml.safe_load((copy / "config.yaml").read_text())["learning_rate"] == 0.1
    assert json.loads((copy / "ds_config.json").read_text())["optimizer"]["params"]["lr"] == 0.1


def test_a_run_that_is_given_up_leaves_no_checkpoint_behind(
    ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path
) -> None:
    """A later auto cannot mistake them; and without --overwrite_output_dir not even a model is replaced."""
    shutil.copytree(two_saved, copy := tmp_path / "copy")
    argv = arguments(dropout, copy, max_steps=1, save_steps=1, learning_rate=0.1)
    said = logged(ranks(2), [*argv, "--overwrite_output_dir"])
    assert "checkpoint-4 of another run, because of --overwrite_output_dir" in said
    assert [folder.name for folder in list_checkpoints(copy)] == ["checkpoint-1"]
    assert [record["step"] for record in records(copy)] == [0, 1]
    shutil.rmtree(copy / "checkpoint-1")
    assert "contains the model of another run; give another folder, " in refused(ranks(2), argv)


def test_damaged_checkpoints_are_passed_over(ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path) -> None:
    shutil.copytree(two_saved, copy := tmp_path / "copy")
    (copy / "finished.json").unlink()
    (copy / "checkpoint-4/state.json").write_text("{}")
    argv = arguments(dropout, copy, max_steps=4)
    assert "state.json is damaged" in refused(ranks(2), [*argv, f"--resume_from_checkpoint={copy}/checkpoint-4"])
    assert "contains checkpoint-4 of another run" in (
        refused(ranks(2), [*argv, f"--resume_from_checkpoint={copy}/checkpoint-2"])
    )
    assert "resumed after step 2 of 4" in run(ranks(2), [*argv, "--resume_from_checkpoint=auto"])
    for folder in list_checkpoints(copy):
        (folder / "state.json").unlink()
    (copy / "finished.json").unlink()
    said = refused(ranks(2), [*argv, "--resume_from_checkpoint=auto"])
    assert "none of the 2 checkpoints in " in said


def test_another_text_or_order_is_refused(ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path) -> None:
    argv = arguments(dropout, tmp_path, max_steps=9, train_file=dropout / "validation.txt")
    said = refused(ranks(2), [*argv, f"--resume_from_checkpoint={two_saved}/checkpoint-2"])
    assert "was saved while training on other data ({" in said
    assert (
        f"changed: --train_file ['{dropout}/train.txt'] -> ['{dropout}/validation.txt']; resume with the same" in said
    )
    assert "there is no checkpoint" in refused(ranks(2), [*argv, "--resume_from_checkpoint=nowhere"])
    argv = [*arguments(dropout, two_saved, seed=43), f"--resume_from_checkpoint={two_saved}/checkpoint-4"]
    assert "--seed 43 (saved: 42)" in refused(ranks(2), argv)
    argv = [*arguments(dropout, two_saved, max_steps=3), "--resume_from_checkpoint=auto"]
    assert "give at least --max_steps 4" in refused(ranks(2), argv)


def test_a_run_goes_on_in_another_folder(ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path) -> None:
    argv = [*arguments(dropout, tmp_path, max_steps=4), f"--resume_from_checkpoint={two_saved}/checkpoint-2/"]
    assert "resumed after step 2 of 4" in run(ranks(2), argv)
    one, other = (load_file(folder / "model.safetensors") for folder in (two_saved, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def scarce_memory(argv: list[str]) -> tuple[int, str, str]:
    """launch/train.py where hardly a byte is free."""
    free_bytes, build.free_bytes = build.free_bytes, lambda: (1, 1)
    try:
        return run_main(argv)
    finally:
        build.free_bytes = free_bytes


def test_auto_stays_with_the_schedule_that_it_chose(ranks: GroupOf, dropout: Path, tmp_path: Path) -> None:
    more = {"gradient_accumulation_steps": 1, "max_steps": 6}
    run(ranks(2), arguments(dropout, tmp_path / "whole", **more))
    argv = [*arguments(dropout, tmp_path / "stopped", **more), "--resume_from_checkpoint=auto"]
    run(ranks(2), argv, {(0, 3): "SIGTERM"})
    assert [status for status, _, _ in ranks(2).run(scarce_memory, argv)] == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "stopped")


# when saving fails


def fail_at(argv: list[str], failing: list[int]) -> tuple[int, str, str]:
    """launch/train.py, in which writing the checkpoints of these steps fails on rank 1."""
    save_file = save.save_file

    def fails(tensors: Any, file: Path) -> None:
        if int(os.environ["RANK"]) == 1 and any(f"checkpoint-{step}." in str(file) for step in failing):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file)

    save.save_file = fails  # type: ignore[assignment]
    try:
        return run_main(argv)
    finally:
        save.save_file = save_file


@pytest.mark.parametrize("async_save", [False, True])
def test_training_goes_on_without_a_checkpoint(ranks: GroupOf, dropout: Path, tmp_path: Path, async_save: bool) -> None:
    argv = arguments(dropout, tmp_path, max_steps=8, save_steps=2, logging_steps=1, async_save=async_save)
    results = ranks(2).run(fail_at, argv, [4, 6])
    assert [status for status, _, _ in results] == [0, 0], results
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-8"]
    assert records(tmp_path)[-1]["failed_saves"] == (1 if async_save else 2), "the second is known at the next save"
    assert not list(tmp_path.glob("*.partial"))


def test_training_ends_where_nothing_was_ever_saved(ranks: GroupOf, dropout: Path, tmp_path: Path) -> None:
    results = ranks(2).run(fail_at, arguments(dropout, tmp_path, max_steps=8, save_steps=2), [2])
    assert [status for status, _, _ in results] == [2, 2], results
    assert "checkpoint-2 cannot be written: No space left on device (rank 1)" in results[0][2]
    assert results[1][2] == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds one checkpoint of the demo's model, but not two of them, nor its export beside it."""
    with mounted(tmp_path / "small", megabytes=8) as folder:
        yield folder


def test_a_full_disk_while_training_and_at_its_end(ranks: GroupOf, dropout: Path, small_disk: Path) -> None:
    """Saves fail and training goes on; the model, which is the last to be written, does not fit: one error message."""
    (small_disk / "filler").write_bytes(bytes(2_600_000))
    argv = arguments(dropout, small_disk, max_steps=6, save_steps=2, logging_steps=1)
    results = ranks(2).run(run_main, argv)
    assert [status for status, _, _ in results] == [2, 2], results
    errors = [line for _, _, err in results for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, results
    assert "the model cannot be written to " in errors[0]
    assert "No space left on device" in errors[0]
    assert records(small_disk)[-1]["failed_saves"] > 0
    assert [folder.name for folder in list_checkpoints(small_disk)] == ["checkpoint-2"]
    open_in_one_process(small_disk / "checkpoint-2")
    (small_disk / "filler").unlink()
    assert "resumed after step 2 of 6" in run(
        ranks(2), [*argv, "--resume_from_checkpoint=auto", "--save_total_limit=1"]
    )


# launch/export.py


def test_export_from_a_checkpoint_is_the_run_s_own(two_saved: Path, tmp_path: Path) -> None:
    assert export(two_saved, tmp_path / "parts", "--max_shard_size=100KB").count("error") == 0, "its newest"
    one, parts = (AutoModelForCausalLM.from_pretrained(folder) for folder in (two_saved, tmp_path / "parts"))
    assert all(torch.equal(one.state_dict()[name], parts.state_dict()[name]) for name in one.state_dict())
    ids = torch.arange(9).view(1, 9)
    assert torch.equal(one.eval()(ids).logits, parts.eval()(ids).logits)
    assert len(list((tmp_path / "parts").glob("model-*-of-*.safetensors"))) > 4
    assert (tmp_path / "parts/generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path / "parts")("fox").input_ids


def test_export_says_no(two_saved: Path, tmp_path: Path) -> None:
    assert "there is no checkpoint" in export(tmp_path / "nowhere", tmp_path / "out")
    shutil.copytree(two_saved / "checkpoint-4", copy := tmp_path / "copy")
    assert '--max_shard_size must be a size such as "5GB"' in export(copy, tmp_path / "out", "--max_shard_size=big")
    assert "contains cache, but an export needs a new or empty folder" in export(two_saved, two_saved)
    assert f"--output_dir {copy}/model/new is inside the input folder {copy}" in export(copy, copy / "model/new")
    weights = next((copy / "weights").iterdir())
    weights.write_bytes(weights.read_bytes()[:-8] + b"12345678")
    assert f"{weights.name} is damaged" in export(copy, tmp_path / "out")
    assert not (tmp_path / "out/config.json").exists()


# what is damaged


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_any_file_of_a_checkpoint_is_named(
    two_saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    """Refused, or told where the file is one of the model's settings, which may have been edited."""
    names = {file.relative_to(two_saved) for file in (two_saved / "checkpoint-4").rglob("*") if file.is_file()}
    kinds = {"config.yaml", "ds_config.json", "state.json", "config.json", "tokenizer.json", "rank-00000.safetensors"}
    assert kinds <= {name.name for name in names}
    for name in names:
        shutil.copytree(two_saved / "checkpoint-4", copy := tmp_path / "checkpoint-4")
        DAMAGE[damage](tmp_path / name)
        caplog.clear()
        try:
            open_in_one_process(copy)
            said = caplog.text if name.parent.name == "model" else ""
        except LomoError as error:
            said = str(error)
        assert name.name in said
        shutil.rmtree(copy)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["model.safetensors", "lomo_ds_manifest.json"])
def test_a_damaged_export_is_never_trained(
    ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path, file: str, damage: str
) -> None:
    shutil.copytree(two_saved, copy := tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    DAMAGE[damage](copy / file)
    said = refused(ranks(2), arguments(dropout, tmp_path / "out", model_name_or_path=copy, max_steps=1))
    assert file in said


def test_an_export_that_a_person_edited_is_trained(
    ranks: GroupOf, dropout: Path, two_saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_saved, copy := tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ messages }}"}))
    run(ranks(2), arguments(dropout, tmp_path / "out", model_name_or_path=copy, max_steps=1))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"
