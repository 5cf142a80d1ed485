"""A Hugging Face folder, or a preset, into ZeRO-3 shards: each rank reads or draws its own part and no more."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from deepspeed.accelerator import get_accelerator
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

from lomo_ds import zero3
from lomo_ds.errors import ModelError
from lomo_ds.models.conversion import find_sources, find_text_sources
from lomo_ds.models.embeddings import NewRows, extend_embeddings, smaller
from lomo_ds.models.files import first_line
from lomo_ds.models.meta_model import meta_model, meta_model_of_class, saved_buffers
from lomo_ds.models.model_config import multimodal_config
from lomo_ds.models.presets import PRESETS, is_preset
from lomo_ds.models.random_weights import random_piece
from lomo_ds.models.sources import Source
from lomo_ds.zero3 import Shard

# beside the weights, what a tokenizer and a configuration consist of
SMALL_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]


def find_model(name: str, download: bool = True, trust_remote_code: bool = False) -> str:
    """The local folder of ``name``: a folder, or a model of the Hugging Face hub; a preset is its own name.

    Args:
        download: whether files that the hub's local cache lacks are fetched.
        trust_remote_code: whether the model's own code is among them.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
    """
    if Path(name).is_dir() or is_preset(name):
        return name
    if len(Path(name).parts) != 2 or name.startswith((".", "~")):
        raise ModelError(
            f"a model is a local folder, a name on the Hugging Face hub (owner/name) or one of {', '.join(PRESETS)}, "
            f"got {name}, which is none of them"
        )
    try:
        wanted = [*SMALL_FILES, "model*.safetensors", *(["*.py"] if trust_remote_code else [])]
        folder = snapshot_download(name, allow_patterns=wanted, local_files_only=not download)
        if not list(Path(folder).glob("model*.safetensors")):
            folder = snapshot_download(name, allow_patterns=["pytorch_model*.bin"], local_files_only=not download)
    except Exception as error:  # huggingface_hub's, httpx's and the operating system's
        raise ModelError(
            f"{name} is no local folder, and cannot be had from the Hugging Face hub: {first_line(error)}"
        ) from error
    return folder


def load_model(
    name: str,
    config: PretrainedConfig,
    ds_config: dict[str, Any],
    dtype: torch.dtype,
    seed: int = 0,
    trust_remote_code: bool = False,
    free_host_bytes: int | None = None,
    stored_rows: int | None = None,
    new_rows: NewRows = "mean",
) -> PreTrainedModel:
    """The causal language model in a folder, or a preset with random weights, its parameters split over the ranks.

    Each rank reads its own shards only, and holds beside them at most one whole tensor's memory. No rank waits for
    another.

    Args:
        seed: of a preset's weights and of new rows, which are the same for any number of ranks.
        free_host_bytes: see ``zero3.partition``.
        stored_rows: of the embeddings in the folder, where ``config`` has been resized; by default as many.
        new_rows: how the others begin.

    Raises:
        ModelError: weights are missing, unexpected, of another shape or unreadable.
    """
    model = meta_model(config, dtype, trust_remote_code)
    if is_preset(name):
        return _fill(
            model, ds_config, dtype, lambda shard: shard.data.copy_(_random(shard, config, seed)), free_host_bytes
        )
    if stored_rows in (None, config.vocab_size):
        sources = _sources(name, model, trust_remote_code)
    else:
        before = meta_model(smaller(config, stored_rows), dtype, trust_remote_code)
        sources = extend_embeddings(model, _sources(name, before, trust_remote_code), new_rows, seed)
    for buffer_name in saved_buffers(model):
        if buffer_name in sources:
            _set_buffer(model, buffer_name, sources[buffer_name].read_whole())
    return _fill(
        model, ds_config, dtype, lambda shard: sources[shard.name].copy_flat(shard.start, shard.data), free_host_bytes
    )


def _sources(name: str, model: PreTrainedModel, trust_remote_code: bool) -> dict[str, Source]:
    whole = multimodal_config(name, model.config, trust_remote_code)
    if whole is None:
        return find_sources(model, Path(name))
    kind = getattr(transformers, whole.architectures[0])
    return find_text_sources(model, meta_model_of_class(kind, whole, model.dtype), Path(name))


def empty_model(
    config: PretrainedConfig,
    ds_config: dict[str, Any],
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    fill: Callable[[Shard], Any] = lambda shard: None,
    free_host_bytes: int | None = None,
) -> PreTrainedModel:
    """The model split over the ranks, its shards and buffers holding anything, for a checkpoint to fill.

    Args:
        fill: writes to each shard, still of ``dtype``, however it will be kept.
        free_host_bytes: see ``zero3.partition``.
    """
    model = meta_model(config, dtype, trust_remote_code)
    for name, buffer in saved_buffers(model).items():
        _set_buffer(model, name, torch.empty_like(buffer, device="cpu"))
    return _fill(model, ds_config, dtype, fill, free_host_bytes)


def _set_buffer(model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
    module, _, attribute = name.rpartition(".")
    model.get_submodule(module)._buffers[attribute] = value


def _random(shard: Shard, config: PretrainedConfig, seed: int) -> torch.Tensor:
    return random_piece(shard.name, shard.shape, shard.start, shard.stop, config.initializer_range, seed)


def _fill(
    model: PreTrainedModel,
    ds_config: dict[str, Any],
    dtype: torch.dtype,
    fill: Callable[[Shard], Any],
    free_host_bytes: int | None,
) -> PreTrainedModel:
    for shard in zero3.partition(model, ds_config, dtype, free_host_bytes):
        fill(shard)
    device = get_accelerator().current_device_name()
    for buffer in model.buffers():  # the engine moves only what it partitions itself
        buffer.data = buffer.data.to(device)
    return model.train()
