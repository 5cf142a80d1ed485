"""Saving of checkpoints by all ranks: write to a temporary folder, checksum, sync, then rename to the final name."""

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.checkpoint.folders import RECORD, WEIGHTS, check_replaceable, publish, write_latest
from lomo_ds.checkpoint.manifest import compute_entries, write_manifest
from lomo_ds.checkpoint.state import FORMAT, Snapshot, rank_state_file
from lomo_ds.checkpoint.weights import save_weights, weight_files_of_rank
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.distributed.device import device_index, set_device
from lomo_ds.errors import CheckpointError

Result = TypeVar("Result")


class Saver:
    """Writer of checkpoints, one at a time, in the calling thread or in a background thread.

    Args:
        group: a gloo process group of all ranks, reserved for this object: a background save runs its collectives
            concurrently with those of training.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group)
        self.executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="checkpoint",
            initializer=set_device,  # the current device is per thread, and device 0 by default
            initargs=(device_index(),),
        )
        self.pending: Future[None] | None = None
        self._destroy_group = weakref.finalize(self, _destroy_group, group)
        self._destroy_group.atexit = False

    def save(
        self,
        snapshot: Snapshot,
        final: Path,
        add_files: Callable[[Path], None] | None = None,
        after_save: Callable[[], None] | None = None,
        in_background: bool = False,
        is_latest: bool = True,
    ) -> None:
        """Write ``snapshot`` to the folder ``final``. Every rank must call this with the same ``final``.

        Args:
            add_files: writes more files into the folder that it is given; only rank 0 calls it.
            after_save: called on rank 0 when the checkpoint is in place.
            in_background: copy the shards (those on NVMe stay there) and return; ``wait`` reports failures.
            is_latest: whether to write the name of this checkpoint to ``latest``.

        Raises:
            CheckpointError: ``final`` exists and is not a checkpoint (raised by the rank that sees it); or the
                checkpoint cannot be written (raised by every rank with the same message). Existing checkpoints are
                unchanged. If a background save fails, the next ``save`` or ``wait`` raises the error.
        """
        self.wait()
        self._check_replaceable(final)
        finalize = partial(_finalize, final, is_latest, after_save)
        if in_background:
            copied = self._on_all(lambda: _copy(snapshot), final)
            self.pending = self.executor.submit(self._write, copied, final, add_files, finalize)
        else:
            self._write(snapshot, final, add_files, finalize)

    def wait(self) -> None:
        """Wait until no save is in progress.

        Raises:
            CheckpointError: the background save failed.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for a save in progress, then destroy the process group and with it the thread that polls connections.

        Raises:
            CheckpointError: see ``wait``.
        """
        self.wait()
        self._destroy_group()
        del self.group

    def _write(
        self,
        snapshot: Snapshot,
        final: Path,
        add_files: Callable[[Path], None] | None,
        finalize: Callable[[Path], None],
    ) -> None:
        temporary = final.with_name(final.name + ".partial")
        try:
            self._on_main(lambda: _make_empty(temporary), final)
            shards, whole = snapshot.shards + snapshot.state_shards, snapshot.buffers | snapshot.replicated_state
            save_weights(shards, whole, temporary / WEIGHTS, self.group)
            self._on_all(lambda: save_file(snapshot.rank_state, rank_state_file(temporary, self.rank)), final)
            self._on_main(lambda: self._write_record(snapshot, temporary, add_files), final)
            self._write_manifest(temporary, final)
            self._on_main(lambda: finalize(temporary), final)
        except CheckpointError:
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)  # frees space if the disk is full
            raise

    def _write_record(self, snapshot: Snapshot, temporary: Path, add_files: Callable[[Path], None] | None) -> None:
        record = {
            "format": FORMAT,
            "world_size": torch.distributed.get_world_size(self.group),
            "tensors": snapshot.tensors,
            "rule_state": snapshot.rule_state,
            **snapshot.record,
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if add_files is not None:
            add_files(temporary)

    def _write_manifest(self, temporary: Path, final: Path) -> None:
        """Compute checksums of the files that each rank wrote (rank 0: the common files too) and write the manifest."""
        written = [rank_state_file(temporary, self.rank), *weight_files_of_rank(temporary / WEIGHTS, self.rank)]
        if self.rank == 0:
            prefixes = ("rank-", "shard-")
            written += [file for file in temporary.rglob("*") if file.is_file() and not file.name.startswith(prefixes)]
        entries = self._on_all(lambda: compute_entries(temporary, written), final)
        all_entries = {name: entry for part in gather_objects(entries, self.group) for name, entry in part.items()}
        self._on_main(lambda: write_manifest(temporary, all_entries), final)

    def _check_replaceable(self, final: Path) -> None:
        """Check on rank 0 that ``final`` may be replaced; if not, raise on all ranks."""
        raise_on_all_ranks(lambda: check_replaceable(final) if self.rank == 0 else None, self.group)

    def _on_main(self, action: Callable[[], None], final: Path) -> None:
        self._on_all(lambda: action() if self.rank == 0 else None, final)

    def _on_all(self, action: Callable[[], Result], final: Path) -> Result:
        """Run ``action`` on every rank; if it fails on any rank, raise the lowest failing rank's error on all."""
        result, cause = None, None
        try:
            result = action()
        except Exception as error:  # any kind: if this rank raised alone, the other ranks would wait for ever
            cause = error
        message = f"{getattr(cause, 'strerror', None) or cause} (rank {self.rank})" if cause else None
        for failure in gather_objects(message, self.group):
            if failure is not None:
                raise CheckpointError(f"{final} cannot be written: {failure}") from cause
        return cast(Result, result)


def _destroy_group(group: ProcessGroup) -> None:
    if torch.distributed.is_initialized():  # otherwise all groups have been destroyed already
        torch.distributed.destroy_process_group(group)


def _copy(snapshot: Snapshot) -> Snapshot:
    """Copy the snapshot so that training cannot change it: to host memory, or on NVMe for shards that are there."""
    return dataclasses.replace(
        snapshot,
        shards=[shard.copy() for shard in snapshot.shards],
        buffers=_copy_to_host(snapshot.buffers),
        state_shards=[shard.copy() for shard in snapshot.state_shards],
        replicated_state=_copy_to_host(snapshot.replicated_state),
    )


def _copy_to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    (folder / WEIGHTS).mkdir(parents=True)


def _finalize(final: Path, is_latest: bool, after_save: Callable[[], None] | None, temporary: Path) -> None:
    publish(temporary, final)
    if is_latest:
        write_latest(final)
    if after_save is not None:
        after_save()
