"""Tests of engine.save_checkpoint and load_checkpoint: bit-exact, on any world size, and safe against damage."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

import lomo_ds
from lomo_ds.checkpoint import list_checkpoints, manifest, open_in_one_process, open_newest, remove_unfinished, weights
from lomo_ds.checkpoint.folders import publish
from lomo_ds.engine.engine_state import capture_engine
from lomo_ds.errors import LomoError
from tests.disks import mounted
from tests.engines import identical, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


def make(precision: str, offload: bool = False) -> lomo_ds.LomoEngine:
    """Build an engine with every kind of state: dropout, stochastic rounding, loss scale, learning-rate schedule."""
    get_accelerator().is_fp16_supported = lambda: True
    precisions: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        # the loss scale overflows at first, then grows every second step
        "fp16": {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}},
    }
    sections = precisions[precision]
    if offload:
        zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu"}}
        sections = sections | {"zero_optimization": zero}
    return make_engine(
        tiny_model(dropout=0.3),
        schedule="stash",
        accumulation=2,
        global_norm=1.0,
        threshold=25,  # some parameters stay gathered
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
        **sections,
    )


def step(engine: lomo_ds.LomoEngine, number: int) -> tuple[float, float, float, float]:
    """Train on this rank's part of a batch, and return the values that are logged."""
    batch = part(whole_batch(number, rows=4 * dist.get_world_size()), dist.get_rank(), dist.get_world_size())
    lr = engine.get_lr()[0]
    loss = float(engine.train_batch([part(batch, 0, 2), part(batch, 1, 2)]))
    return loss, engine.get_global_grad_norm(), lr, engine.cur_scale


def check_bit_exact_resume(folder: str, precision: str, offload: bool, in_background: bool) -> None:
    """Check that a run that is saved and resumed has the same weights and logs as a run without interruption."""
    torch.manual_seed(5)
    uninterrupted = make(precision, offload)
    expected = [step(uninterrupted, number) for number in range(8)]
    scales_after_resume = {scale for *_, scale in expected[5:]}
    assert precision != "fp16" or (uninterrupted.skipped_steps and len(scales_after_resume) > 1), "the scale changes"

    torch.manual_seed(5)
    interrupted = make(precision, offload)
    for number in range(5):
        step(interrupted, number)
    interrupted.save_checkpoint(folder, client_state={"number": 5}, in_background=in_background)
    step(interrupted, 5)  # possibly while the shards are being written
    interrupted.saver.wait()

    torch.manual_seed(99)
    resumed = make(precision, offload)
    assert resumed.load_checkpoint(folder) == (f"{folder}/checkpoint-5", {"number": 5})
    logged = [step(resumed, number) for number in range(5, 8)]
    assert str(logged) == str(expected[5:])
    assert identical(weights_of(resumed), weights_of(uninterrupted))
    assert (resumed.global_steps, resumed.skipped_steps) == (uninterrupted.global_steps, uninterrupted.skipped_steps)


@pytest.mark.parametrize(
    ("precision", "offload", "in_background"),
    [("bf16", False, False), ("fp16", False, True), ("fp32", False, True), ("bf16", True, True)],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_is_bit_exact(
    ranks: GroupOf, tmp_path: Path, world_size: int, precision: str, offload: bool, in_background: bool
) -> None:
    ranks(world_size).run(check_bit_exact_resume, str(tmp_path), precision, offload, in_background)


# resuming with another world size


def save_trained(folder: str) -> dict[str, Tensor]:
    weights.FILE_BYTES = 3000  # several files per rank
    engine = make("bf16")
    step(engine, 0)
    engine.save_checkpoint(folder)
    return weights_of(engine)


def load_and_save(folder: str) -> dict[str, Tensor]:
    """Load the checkpoint, save it again, and return the loaded weights."""
    engine = make("bf16")
    engine.load_checkpoint(folder)
    engine.save_checkpoint(folder)
    loaded = weights_of(engine)
    step(engine, 1)
    assert not identical(weights_of(engine), loaded), "training continues"
    return loaded


def test_any_world_size_loads_the_same_bits(ranks: GroupOf, tmp_path: Path) -> None:
    saved = ranks(4).run(save_trained, str(tmp_path))[0]
    for world_size in (2, 1, 3, 8):
        for loaded in ranks(world_size).run(load_and_save, str(tmp_path)):
            assert identical(loaded, saved), world_size


# checkpoints that are not loaded


def save_two(folder: str) -> None:
    engine = make("bf16")
    for number in (1, 2):
        step(engine, number)
        engine.save_checkpoint(folder)


@pytest.fixture(scope="module")
def two_checkpoints(ranks: GroupOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    ranks(2).run(save_two, str(folder))
    return folder


def load_error(folder: str, tag: str | None) -> list[str]:
    """Return this rank's error message of load_checkpoint, and check that the engine is unchanged."""
    engine = make("bf16")
    before = weights_of(engine)
    try:
        engine.load_checkpoint(folder, tag)
    except LomoError as error:
        assert identical(weights_of(engine), before)
        return [str(error)] if error.only_on_this_rank else []
    return ["it was loaded"]


def newest_name(folder: str) -> str:
    return open_newest(Path(folder), capture_engine(make("bf16")).tensors).folder.name  # type: ignore[union-attr]


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "one flipped byte": lambda file: file.write_bytes(
        (content := file.read_bytes())[: len(content) // 2]
        + bytes([content[len(content) // 2] ^ 1])
        + content[len(content) // 2 + 1 :]
    ),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "missing": lambda file: file.unlink(),
}
KINDS = ["state.json", "rank-00001.safetensors", "weights/shard-00002-*.safetensors", "lomo_ds_manifest.json"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_skipped(
    ranks: GroupOf, two_checkpoints: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    file = next((copy / "checkpoint-2").glob(kind))
    DAMAGE[damage](file)
    messages = [message for of_rank in ranks(2).run(load_error, str(copy), None) for message in of_rank]
    assert len(messages) == 1, "one rank reports it"
    assert file.name in messages[0]
    assert ranks(2).run(newest_name, str(copy)) == ["checkpoint-1", "checkpoint-1"]
    assert ranks(1).run(newest_name, str(copy)) == ["checkpoint-1"], "one rank alone detects it as well"


def test_latest_names_a_missing_checkpoint(ranks: GroupOf, two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    (copy / "latest").write_text("checkpoint-3\n")
    assert "there is no checkpoint" in ranks(1).run(load_error, str(copy), None)[0][0]
    assert ranks(1).run(newest_name, str(copy)) == ["checkpoint-2"], "the highest step instead"
    (copy / "latest").unlink()
    assert ranks(1).run(load_newest, str(copy)) == [(None, None)]


def load_newest(folder: str) -> tuple[str | None, Any]:
    return make("bf16").load_checkpoint(folder)


def other_model_error(folder: str) -> str:
    engine = make_engine(tiny_model(tied=True), bf16={"enabled": True})
    with pytest.raises(LomoError) as error:
        engine.load_checkpoint(folder)
    return str(error.value)


def other_precision_error(folder: str) -> str:
    with pytest.raises(LomoError) as error:
        make("fp32").load_checkpoint(folder)
    return str(error.value)


def test_a_checkpoint_of_another_model_is_rejected(ranks: GroupOf, two_checkpoints: Path) -> None:
    assert (
        "its lm_head.weight is (61, 20) bfloat16, but this model's is absent"
        in (ranks(1).run(other_model_error, str(two_checkpoints))[0])
    )
    assert (
        "bfloat16, but this model's is (1,) float32" in (ranks(1).run(other_precision_error, str(two_checkpoints))[0])
    )


def test_world_size_that_does_not_match_the_files(ranks: GroupOf, two_checkpoints: Path, tmp_path: Path) -> None:
    """Check that a mixture of two saves is detected even if its manifest is intact."""
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    state = copy / "checkpoint-2/state.json"
    state.write_text(state.read_text().replace('"world_size": 2', '"world_size": 4'))
    names = [file for file in (copy / "checkpoint-2").rglob("*") if file.is_file() and file.name != manifest.MANIFEST]
    manifest.write_manifest(copy / "checkpoint-2", manifest.compute_entries(copy / "checkpoint-2", names))
    assert "4 ranks saved it, but it holds files of 2" in ranks(1).run(load_error, str(copy), None)[0][0]


def test_weight_files_that_the_manifest_does_not_name(ranks: GroupOf, two_checkpoints: Path, tmp_path: Path) -> None:
    """Check that extra files are detected, since they would be read with the others.

    They may be left when a checkpoint is copied over an older one.
    """
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    weights_folder = copy / "checkpoint-2/weights"
    shutil.copy(next(weights_folder.iterdir()), weights_folder / "shard-00003-model-00001-of-00001.safetensors")
    assert "is not part of this checkpoint" in ranks(1).run(load_error, str(copy), None)[0][0]


def test_killed_while_one_checkpoint_replaces_another(two_checkpoints: Path, tmp_path: Path) -> None:
    """Check that the old checkpoint is restored and the unfinished new one is deleted."""
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    (copy / "checkpoint-2").rename(copy / "checkpoint-2.replaced")
    (copy / "checkpoint-1").rename(copy / "checkpoint-2.partial")
    remove_unfinished(copy)
    assert [folder.name for folder in list_checkpoints(copy)] == ["checkpoint-2"]
    assert len(list(copy.iterdir())) == 2, "the checkpoint and latest"
    open_in_one_process(copy / "checkpoint-2")


def test_a_failed_rename_leaves_the_old_checkpoint(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        publish(copy / "no such.partial", copy / "checkpoint-2")
    open_in_one_process(copy / "checkpoint-2")


def resume_multi_step_lr(folder: str) -> bool:
    """Check that a scheduler whose state has integer keys resumes, and that no save is allowed within a step."""

    def new_engine() -> lomo_ds.LomoEngine:
        return make_engine(
            tiny_model(),
            "stash",
            accumulation=2,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3]),
        )

    uninterrupted, interrupted, resumed = new_engine(), new_engine(), new_engine()
    for number in range(2):
        step(uninterrupted, number)
        step(interrupted, number)
    interrupted.save_checkpoint(folder, in_background=True)
    interrupted.load_checkpoint(folder)
    resumed.load_checkpoint(folder)
    for number in range(2, 5):
        step(uninterrupted, number)
        step(resumed, number)
    assert resumed.get_lr() == uninterrupted.get_lr() == [pytest.approx(0.003)]
    loss = resumed(**whole_batch(0, rows=2)).loss
    resumed.backward(loss)
    with pytest.raises(LomoError, match="save_checkpoint must not run inside an unfinished step"):
        resumed.save_checkpoint(folder)
    return identical(weights_of(resumed), weights_of(uninterrupted))


def test_any_scheduler_resumes(ranks: GroupOf, tmp_path: Path) -> None:
    assert ranks(2).run(resume_multi_step_lr, str(tmp_path)) == [True, True]


def test_no_file_of_a_checkpoint_is_a_pickle(two_checkpoints: Path) -> None:
    for file in two_checkpoints.rglob("*"):
        assert file.is_dir() or file.suffix in (".json", ".safetensors") or file.name == "latest", file


# saves that fail


def failed_save_error(folder: str) -> str:
    engine = make("bf16")
    with pytest.raises(LomoError) as error:
        engine.save_checkpoint(folder)
    step(engine, 0)
    return str(error.value)


def test_all_ranks_report_a_full_disk_and_leave_no_files(ranks: GroupOf, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(free_bytes(small_disk) - 40_000))
    messages = ranks(2).run(failed_save_error, str(small_disk))
    assert "checkpoint-0 cannot be written: " in messages[0]
    assert "No space left on device" in messages[0]
    assert messages[0] == messages[1]
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_a_read_only_disk(ranks: GroupOf, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in ranks(2).run(failed_save_error, str(small_disk))[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of two megabytes."""
    with mounted(tmp_path / "small", megabytes=2) as folder:
        yield folder


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def client_state_error(folder: str) -> str:
    with pytest.raises(TypeError) as error:
        make("bf16").save_checkpoint(folder, client_state={"loss": torch.zeros(1)})
    return str(error.value)


def test_a_client_state_that_is_not_json(ranks: GroupOf, tmp_path: Path) -> None:
    assert "not JSON serializable" in ranks(1).run(client_state_error, str(tmp_path))[0]
    assert list_checkpoints(tmp_path) == []
