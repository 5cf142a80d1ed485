"""A checkpoint written by all ranks: aside first, checksummed, synced, and renamed when it is whole."""

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
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from torch.distributed import ProcessGroup

from lomo_ds.checkpoint.folders import RECORD, WEIGHTS, point_latest, publish, refuse_to_replace
from lomo_ds.checkpoint.manifest import entries, write_manifest
from lomo_ds.checkpoint.state import FORMAT, Snapshot, rank_file
from lomo_ds.checkpoint.weights import files_of_rank, save_weights
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.errors import CheckpointError

Result = TypeVar("Result")


class Saver:
    """Writes checkpoints, one at a time, in this thread or in one of its own.

    Args:
        group: of all ranks, over host memory (gloo), used for nothing else: a save of its own thread runs beside
            the training's collectives.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group)
        accelerator = get_accelerator()
        self.executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="checkpoint",
            initializer=accelerator.set_device,  # each thread has a device of its own, the first one unless told
            initargs=(accelerator.current_device(),),
        )
        self.pending: Future[None] | None = None
        self._end_group = weakref.finalize(self, _end, group)
        self._end_group.atexit = False

    def save(
        self,
        snapshot: Snapshot,
        final: Path,
        add_files: Callable[[Path], None] | None = None,
        then: Callable[[], None] | None = None,
        in_background: bool = False,
        is_latest: bool = True,
    ) -> None:
        """Write ``snapshot`` as the folder ``final``; every rank calls it with the same ``final``.

        Args:
            add_files: writes further files into the folder that it is given; rank 0 calls it.
            then: what rank 0 does when the checkpoint is in place.
            in_background: copy the shards (on NVMe, where they lie there) and return; ``wait`` tells how it ended.
            is_latest: let ``latest`` name it.

        Raises:
            CheckpointError: ``final`` is something else than a checkpoint, which the rank that knows says; or it could
                not be written, on every rank in the same words. Nothing that was there before has changed. Of a save in
                the background, the next ``save`` or ``wait`` raises it.
        """
        self.wait()
        self._refuse_to_replace(final)
        put_in_place = partial(_put_in_place, final, is_latest, then)
        if in_background:
            copied = self._on_all(lambda: _set_apart(snapshot), final)
            self.pending = self.executor.submit(self._write, copied, final, add_files, put_in_place)
        else:
            self._write(snapshot, final, add_files, put_in_place)

    def wait(self) -> None:
        """Until no save is under way.

        Raises:
            CheckpointError: the one in the background could not be written.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is under way, and end the group: a thread of it polls its connections until then.

        Raises:
            CheckpointError: see ``wait``.
        """
        self.wait()
        self._end_group()
        del self.group

    def _write(
        self,
        snapshot: Snapshot,
        final: Path,
        add_files: Callable[[Path], None] | None,
        put_in_place: Callable[[Path], None],
    ) -> None:
        aside = final.with_name(final.name + ".partial")
        try:
            self._on_main(lambda: _make_empty(aside), final)
            save_weights(snapshot.shards, snapshot.buffers, aside / WEIGHTS, self.group)
            self._on_all(lambda: save_file(snapshot.of_rank, rank_file(aside, self.rank)), final)
            self._on_main(lambda: self._write_record(snapshot, aside, add_files), final)
            self._write_manifest(aside, final)
            self._on_main(lambda: put_in_place(aside), final)
        except CheckpointError:
            if self.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)  # the disk may be full
            raise

    def _write_record(self, snapshot: Snapshot, aside: Path, add_files: Callable[[Path], None] | None) -> None:
        record = {
            "format": FORMAT,
            "world_size": torch.distributed.get_world_size(self.group),
            "tensors": snapshot.tensors,
            **snapshot.record,
        }
        (aside / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if add_files is not None:
            add_files(aside)

    def _write_manifest(self, aside: Path, final: Path) -> None:
        """Each rank reads back and sums what it has written, rank 0 the rest."""
        mine = [rank_file(aside, self.rank), *files_of_rank(aside / WEIGHTS, self.rank)]
        if self.rank == 0:
            of_ranks = ("rank-", "shard-")
            mine += [file for file in aside.rglob("*") if file.is_file() and not file.name.startswith(of_ranks)]
        found = self._on_all(lambda: entries(aside, mine), final)
        every = {name: entry for part in gather_objects(found, self.group) for name, entry in part.items()}
        self._on_main(lambda: write_manifest(aside, every), final)

    def _refuse_to_replace(self, final: Path) -> None:
        """Before anything is written; where one rank sees what is in the way, all raise."""
        raise_on_all_ranks(lambda: refuse_to_replace(final) if self.rank == 0 else None, self.group)

    def _on_main(self, action: Callable[[], None], final: Path) -> None:
        self._on_all(lambda: action() if self.rank == 0 else None, final)

    def _on_all(self, action: Callable[[], Result], final: Path) -> Result:
        """Run ``action``; if it fails on any rank, all raise, in the words of the first."""
        result, cause = None, None
        try:
            result = action()
        except Exception as error:  # whatever it is: a rank that kept it to itself would leave the others waiting
            cause = error
        told = f"{getattr(cause, 'strerror', None) or cause} (rank {self.rank})" if cause else None
        for failure in gather_objects(told, self.group):
            if failure is not None:
                raise CheckpointError(f"{final} cannot be written: {failure}") from cause
        return cast(Result, result)


def _end(group: ProcessGroup) -> None:
    if torch.distributed.is_initialized():  # else it has ended with all others
        torch.distributed.destroy_process_group(group)


def _set_apart(snapshot: Snapshot) -> Snapshot:
    """Copies that training does not change: in host memory, or on NVMe what lies there."""
    shards = [shard.copy() for shard in snapshot.shards]
    buffers = {name: buffer.to("cpu", copy=True) for name, buffer in snapshot.buffers.items()}
    return dataclasses.replace(snapshot, shards=shards, buffers=buffers)


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    (folder / WEIGHTS).mkdir(parents=True)


def _put_in_place(final: Path, is_latest: bool, then: Callable[[], None] | None, aside: Path) -> None:
    publish(aside, final)
    if is_latest:
        point_latest(final)
    if then is not None:
        then()
