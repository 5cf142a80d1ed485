"""Export of weights to a Hugging Face folder that transformers loads, with one output file in memory at a time."""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lomo_ds import zero3
from lomo_ds.checkpoint.manifest import MANIFEST, compute_entries, sync_folder, write_manifest
from lomo_ds.distributed.collectives import raise_on_all_ranks
from lomo_ds.errors import ModelError
from lomo_ds.models.conversion import saved_sources
from lomo_ds.models.meta_model import meta_model_of_class, saved_buffers, saved_tensors
from lomo_ds.models.sources import Source, Stored, stored_names

MAX_SHARD_SIZE = "5GB"  # transformers' own
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
SAVING = ".saving"  # subfolder that holds an unfinished export
WEIGHTS = r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"  # names of weight files that an export writes


def save_pretrained(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> None:
    """Write the weights, configuration and tokenizer of an engine's ``module``. Every rank must call this.

    Parameters are gathered one at a time, and rank 0 holds those of one output file.

    Args:
        max_shard_size: largest size of an output file, for example ``"5GB"``; a single tensor may be larger.

    Raises:
        ModelError: ``folder`` cannot be written (raised on rank 0; the other ranks raise ``PeerError``).
    """
    main = dist.get_rank() == 0
    parameters, buffers = dict(model.named_parameters()), saved_buffers(model)

    def full_tensor(name: str) -> Tensor | None:
        if name in buffers:
            return buffers[name].cpu()
        with zero3.gathered([parameters[name]]):
            return parameters[name].detach().to("cpu", copy=True) if main else None

    export = raise_on_all_ranks(
        lambda: Export(folder, meta_model_of_class(type(model), model.config, model.dtype), max_shard_size)
    )
    _on_main(export.start)
    for file, names in export.files.items():
        tensors = {name: tensor for name in names if (tensor := full_tensor(name)) is not None}
        _on_main(partial(export.write, file, tensors))
        del tensors
    _on_main(partial(export.finish, model, tokenizer))


def _on_main(action: Callable[[], None]) -> None:
    """Run ``action`` on rank 0; if it fails, raise on all ranks."""
    raise_on_all_ranks(lambda: action() if dist.get_rank() == 0 else None)


class Export:
    """Writer of an exported folder: files are written to a subfolder and moved into place when all are complete.

    Args:
        model: a model on the meta device with the shapes and dtype of the weights.

    Attributes:
        files: for each output file, the names of the model's tensors that it needs.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, max_shard_size: str = MAX_SHARD_SIZE) -> None:
        self.folder = folder
        self.partial = folder / SAVING
        self.values: dict[str, Tensor] = {}  # model tensors that the current output file needs
        self.sources = saved_sources(
            model,
            {
                name: Stored(tensor.shape, tensor.dtype, name, partial(self._copy_piece, name))
                for name, tensor in saved_tensors(model).items()
            },
        )
        meta = {name: torch.empty(s.shape, dtype=s.dtype, device="meta") for name, s in self.sources.items()}
        try:
            self.split = split_state_dict_into_shards_factory(
                meta,
                get_storage_size=lambda tensor: tensor.numel() * tensor.itemsize,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError:
            raise ModelError(
                f'--max_shard_size must be a size such as "5GB" or "500MB", got {max_shard_size!r}'
            ) from None
        self.files = {
            file: list(dict.fromkeys(stored for name in names for stored in stored_names(self.sources[name])))
            for file, names in self.split.filename_to_tensors.items()
        }

    def start(self) -> None:
        """Create the subfolder, deleting the remains of an interrupted export.

        Raises:
            ModelError: the folder cannot be written.
        """
        with self._writing():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def write(self, file: str, values: dict[str, Tensor]) -> None:
        """Write one of ``files``.

        Args:
            values: the model's tensors that the file needs, keyed by name.

        Raises:
            ModelError: the file cannot be written.
        """
        self.values = values
        tensors = {name: self._file_tensor(self.sources[name]) for name in self.split.filename_to_tensors[file]}
        with self._writing():
            save_file(tensors, self.partial / file, metadata={"format": "pt", "manifest": MANIFEST})
            _order_metadata(self.partial / file)
        self.values = {}

    def _file_tensor(self, source: Source) -> Tensor:
        return self.values[source.name] if isinstance(source, Stored) else source.read_whole().contiguous()

    def _copy_piece(self, name: str, start: int, out: Tensor) -> None:
        out.copy_(self.values[name].view(-1)[start : start + out.numel()])

    def finish(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Write the index, settings, tokenizer and manifest, and move all files into place, ``config.json`` last.

        Raises:
            ModelError: the folder cannot be written.
        """
        with self._writing():
            if self.split.is_sharded:
                index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
                (self.partial / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            save_settings(model, tokenizer, self.partial)
            write_manifest(self.partial, compute_entries(self.partial, _files_below(self.partial)))
            # a folder without config.json is not loadable, so nobody loads it while old and new files are mixed
            (self.folder / CONFIG).unlink(missing_ok=True)
            for stale in self.folder.iterdir():  # an earlier export may have another number of parts
                if re.fullmatch(WEIGHTS, stale.name) and not (self.partial / stale.name).exists():
                    stale.unlink()
            for file in sorted(_files_below(self.partial), key=lambda file: file == self.partial / CONFIG):
                target = self.folder / file.relative_to(self.partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            shutil.rmtree(self.partial)
            sync_folder(self.folder)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.partial, ignore_errors=True)  # frees space if the disk is full
            reason = getattr(error, "strerror", None) or str(error)
            raise ModelError(f"the model cannot be written to {self.folder}: {reason}") from error


def _files_below(folder: Path) -> list[Path]:
    """Return all files in ``folder`` and its subfolders, which tokenizers with several chat templates have."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _order_metadata(file: Path) -> None:
    """Sort the metadata of a safetensors file, which has no fixed order, so that equal weights give equal bytes."""
    with file.open("r+b") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(ordered) == length
        opened.seek(8)
        opened.write(ordered)


def save_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Write the files of a model folder other than the weights: configuration, generation configuration, tokenizer."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.generation_config is not None:
        # unlike save_pretrained, this also writes contradictory settings, which some models have
        model.generation_config.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
