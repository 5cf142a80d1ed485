"""engine.save_checkpoint and load_checkpoint: bit for bit, on any number of ranks, and nothing that is damaged."""

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
from lomo_ds.checkpoint import checkpoints_in, manifest, newest_whole, open_alone, remove_unfinished, weights
from lomo_ds.checkpoint.folders import publish
from lomo_ds.engine.engine_state import capture_engine
from lomo_ds.errors import LomoError
from tests.disks import mounted
from tests.engines import identical, make_engine, weights_of
from tests.ranks import Ranks
from tests.reference import part, tiny_model, whole_batch

GroupOf = Callable[..., Ranks]


def make(precision: str, offload: bool = False) -> lomo_ds.LomoEngine:
    """An engine with all that has a state: dropout, stochastic rounding, a loss scale, a learning-rate schedule."""
    get_accelerator().is_fp16_supported = lambda: True
    precisions: dict[str, dict[str, Any]] = {
        "fp32": {},
        "bf16": {"bf16": {"enabled": True}},
        # overflows at first, and grows every second step
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
    """Train on this rank's part of a batch; everything that a log line tells."""
    mine = part(whole_batch(number, rows=4 * dist.get_world_size()), dist.get_rank(), dist.get_world_size())
    lr = engine.get_lr()[0]
    loss = float(engine.train_batch([part(mine, 0, 2), part(mine, 1, 2)]))
    return loss, engine.get_global_grad_norm(), lr, engine.cur_scale


def interrupted_and_not(folder: str, precision: str, offload: bool, in_background: bool) -> None:
    """A run that is saved, thrown away and resumed ends as one that never stopped, and says the same on the way."""
    torch.manual_seed(5)
    whole = make(precision, offload)
    expected = [step(whole, number) for number in range(8)]
    assert precision != "fp16" or (whole.skipped_steps and len({scale for *_, scale in expected[5:]}) > 1), "in motion"

    torch.manual_seed(5)
    stopped = make(precision, offload)
    for number in range(5):
        step(stopped, number)
    stopped.save_checkpoint(folder, client_state={"number": 5}, in_background=in_background)
    step(stopped, 5)  # while the shards are being written, perhaps
    stopped.saver.wait()

    torch.manual_seed(99)
    resumed = make(precision, offload)
    assert resumed.load_checkpoint(folder) == (f"{folder}/checkpoint-5", {"number": 5})
    told = [step(resumed, number) for number in range(5, 8)]
    assert str(told) == str(expected[5:])
    assert identical(weights_of(resumed), weights_of(whole))
    assert (resumed.global_steps, resumed.skipped_steps) == (whole.global_steps, whole.skipped_steps)


@pytest.mark.parametrize(
    ("precision", "offload", "in_background"),
    [("bf16", False, False), ("fp16", False, True), ("fp32", False, True), ("bf16", True, True)],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_is_never_stopped(
    ranks: GroupOf, tmp_path: Path, world_size: int, precision: str, offload: bool, in_background: bool
) -> None:
    ranks(world_size).run(interrupted_and_not, str(tmp_path), precision, offload, in_background)


# another number of ranks


def save_trained(folder: str) -> dict[str, Tensor]:
    weights.FILE_BYTES = 3000  # several files a rank
    engine = make("bf16")
    step(engine, 0)
    engine.save_checkpoint(folder)
    return weights_of(engine)


def load_and_save(folder: str) -> dict[str, Tensor]:
    """The weights as loaded, from which the next checkpoint is written."""
    engine = make("bf16")
    engine.load_checkpoint(folder)
    engine.save_checkpoint(folder)
    loaded = weights_of(engine)
    step(engine, 1)
    assert not identical(weights_of(engine), loaded), "it goes on"
    return loaded


def test_any_number_of_ranks_goes_on_with_the_same_bits(ranks: GroupOf, tmp_path: Path) -> None:
    saved = ranks(4).run(save_trained, str(tmp_path))[0]
    for world_size in (2, 1, 3, 8):
        for loaded in ranks(world_size).run(load_and_save, str(tmp_path)):
            assert identical(loaded, saved), world_size


# what is not loaded


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


def refusal(folder: str, tag: str | None) -> list[str]:
    """What load_checkpoint says, over all ranks; and that nothing of the engine has changed."""
    engine = make("bf16")
    before = weights_of(engine)
    try:
        engine.load_checkpoint(folder, tag)
    except LomoError as error:
        assert identical(weights_of(engine), before)
        return [str(error)] if error.only_here else []
    return ["it was loaded"]


def newest(folder: str) -> str:
    return newest_whole(Path(folder), capture_engine(make("bf16")).tensors).folder.name  # type: ignore[union-attr]


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
def test_damage_is_named_never_loaded_and_passed_over(
    ranks: GroupOf, two_checkpoints: Path, tmp_path: Path, kind: str, damage: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_checkpoints, copy)
    file = next((copy / "checkpoint-2").glob(kind))
    DAMAGE[damage](file)
    said = [sentence for told in ranks(2).run(refusal, str(copy), None) for sentence in told]
    assert len(said) == 1, "one rank speaks"
    assert file.name in said[0]
    assert ranks(2).run(newest, str(copy)) == ["checkpoint-1", "checkpoint-1"]
    assert ranks(1).run(newest, str(copy)) == ["checkpoint-1"], "found by however few ranks"


def test_latest_that_points_nowhere(ranks: GroupOf, two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    (copy / "latest").write_text("checkpoint-3\n")
    assert "there is no checkpoint" in ranks(1).run(refusal, str(copy), None)[0][0]
    assert ranks(1).run(newest, str(copy)) == ["checkpoint-2"], "the highest step then"
    (copy / "latest").unlink()
    assert ranks(1).run(load_nothing, str(copy)) == [(None, None)]


def load_nothing(folder: str) -> tuple[str | None, Any]:
    return make("bf16").load_checkpoint(folder)


def refused_other_model(folder: str) -> str:
    engine = make_engine(tiny_model(tied=True), bf16={"enabled": True})
    with pytest.raises(LomoError) as error:
        engine.load_checkpoint(folder)
    return str(error.value)


def refused_other_precision(folder: str) -> str:
    with pytest.raises(LomoError) as error:
        make("fp32").load_checkpoint(folder)
    return str(error.value)


def test_another_model_is_refused(ranks: GroupOf, two_checkpoints: Path) -> None:
    assert (
        "its lm_head.weight is (61, 20) bfloat16, and this model's is absent"
        in (ranks(1).run(refused_other_model, str(two_checkpoints))[0])
    )
    assert (
        "bfloat16, and this model's is (1,) float32" in (ranks(1).run(refused_other_precision, str(two_checkpoints))[0])
    )


def test_files_of_ranks_that_were_not_there(ranks: GroupOf, two_checkpoints: Path, tmp_path: Path) -> None:
    """A manifest may be whole and yet describe a mixture of two saves."""
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    state = copy / "checkpoint-2/state.json"
    state.write_text(state.read_text().replace('"world_size": 2', '"world_size": 4'))
    names = [file for file in (copy / "checkpoint-2").rglob("*") if file.is_file() and file.name != manifest.MANIFEST]
    manifest.write_manifest(copy / "checkpoint-2", manifest.entries(copy / "checkpoint-2", names))
    assert "it is of 4 ranks, and holds the files of 2" in ranks(1).run(refusal, str(copy), None)[0][0]


def test_weights_that_the_manifest_does_not_name(ranks: GroupOf, two_checkpoints: Path, tmp_path: Path) -> None:
    """Left over from a copy over an older checkpoint, say: they would be read with the others."""
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    weights_folder = copy / "checkpoint-2/weights"
    shutil.copy(next(weights_folder.iterdir()), weights_folder / "shard-00003-model-00001-of-00001.safetensors")
    assert "is not of this checkpoint" in ranks(1).run(refusal, str(copy), None)[0][0]


def test_killed_while_a_checkpoint_takes_the_place_of_another(two_checkpoints: Path, tmp_path: Path) -> None:
    """The old one is back, whatever had become of the new one."""
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    (copy / "checkpoint-2").rename(copy / "checkpoint-2.replaced")
    (copy / "checkpoint-1").rename(copy / "checkpoint-2.partial")
    remove_unfinished(copy)
    assert [folder.name for folder in checkpoints_in(copy)] == ["checkpoint-2"]
    assert len(list(copy.iterdir())) == 2, "and latest"
    open_alone(copy / "checkpoint-2")


def test_a_checkpoint_that_cannot_be_renamed_leaves_the_old_one(two_checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(two_checkpoints, copy := tmp_path / "copy")
    with pytest.raises(FileNotFoundError):
        publish(copy / "no such.partial", copy / "checkpoint-2")
    open_alone(copy / "checkpoint-2")


def rising_milestones(folder: str) -> bool:
    """A scheduler whose state has numbers for keys goes on too; and a save waits for the end of a step."""

    def made() -> lomo_ds.LomoEngine:
        return make_engine(
            tiny_model(),
            "stash",
            accumulation=2,
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3]),
        )

    whole, stopped, resumed = made(), made(), made()
    for number in range(2):
        step(whole, number)
        step(stopped, number)
    stopped.save_checkpoint(folder, in_background=True)
    stopped.load_checkpoint(folder)
    resumed.load_checkpoint(folder)
    for number in range(2, 5):
        step(whole, number)
        step(resumed, number)
    assert resumed.get_lr() == whole.get_lr() == [pytest.approx(0.003)]
    loss = resumed(**whole_batch(0, rows=2)).loss
    resumed.backward(loss)
    with pytest.raises(LomoError, match="save_checkpoint must not run inside an unfinished step"):
        resumed.save_checkpoint(folder)
    return identical(weights_of(resumed), weights_of(whole))


def test_any_scheduler_goes_on(ranks: GroupOf, tmp_path: Path) -> None:
    assert ranks(2).run(rising_milestones, str(tmp_path)) == [True, True]


def test_no_file_of_a_checkpoint_is_a_pickle(two_checkpoints: Path) -> None:
    for file in two_checkpoints.rglob("*"):
        assert file.is_dir() or file.suffix in (".json", ".safetensors") or file.name == "latest", file


# what a save leaves alone


def save_onto_a_full_disk(folder: str) -> str:
    engine = make("bf16")
    with pytest.raises(LomoError) as error:
        engine.save_checkpoint(folder)
    step(engine, 0)
    return str(error.value)


def test_a_full_disk_is_told_by_all_ranks_and_leaves_nothing_behind(ranks: GroupOf, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(small_disk_free(small_disk) - 40_000))
    told = ranks(2).run(save_onto_a_full_disk, str(small_disk))
    assert "checkpoint-0 cannot be written: " in told[0]
    assert "No space left on device" in told[0]
    assert told[0] == told[1]
    assert [file.name for file in small_disk.iterdir()] == ["filler"]


def test_a_disk_that_is_read_only(ranks: GroupOf, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert "Read-only file system" in ranks(2).run(save_onto_a_full_disk, str(small_disk))[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    with mounted(tmp_path / "small", megabytes=2) as folder:
        yield folder


def small_disk_free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def unsaved_state(folder: str) -> str:
    with pytest.raises(TypeError) as error:
        make("bf16").save_checkpoint(folder, client_state={"loss": torch.zeros(1)})
    return str(error.value)


def test_a_client_state_that_is_no_json(ranks: GroupOf, tmp_path: Path) -> None:
    assert "not JSON serializable" in ranks(1).run(unsaved_state, str(tmp_path))[0]
    assert checkpoints_in(tmp_path) == []
