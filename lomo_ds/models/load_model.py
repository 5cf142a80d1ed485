"""Loading of a Hugging Face folder or a preset into ZeRO-3 shards: each rank reads or draws only its own part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import PretrainedConfig, PreTrainedModel

from lomo_ds import zero3
from lomo_ds.distributed.device import compute_device
from lomo_ds.errors import ModelError
from lomo_ds.models.conversion import find_sources, find_text_sources
from lomo_ds.models.embeddings import NewRows, config_before_resize, extend_embeddings
from lomo_ds.models.files import first_line
from lomo_ds.models.meta_model import meta_model, meta_model_of_class, saved_buffers
from lomo_ds.models.model_config import multimodal_config
from lomo_ds.models.presets import PRESETS, is_preset
from lomo_ds.models.random_weights import random_piece
from lomo_ds.models.sources import Source
from lomo_ds.zero3 import Shard

# files of configurations and tokenizers
SMALL_FILES = ["*.json", "*.model", "*.tiktoken", "*.txt", "*.jinja"]


def find_model(name: str, download: bool = True, trust_remote_code: bool = False) -> str:
    """Return the local folder of ``name``, which is a folder or a model on the Hugging Face hub; presets are unchanged.

    Args:
        download: whether to download files that are missing in the hub's local cache.
        trust_remote_code: whether to include the model's own code.

    Raises:
        ModelError: there is no such model, or the hub cannot be reached.
    """
    if Path(name).is_dir() or is_preset(name):
        return name
    if len(Path(name).parts) != 2 or name.startswith((".", "~")):
        raise ModelError(
            f"a model is a local folder, a name on the Hugging Face hub (owner/name) or one of {', '.join(PRESETS)}, "
            f"got {name}"
        )
    try:
        patterns = [*SMALL_FILES, "model*.safetensors", *(["*.py"] if trust_remote_code else [])]
        folder = snapshot_download(name, allow_patterns=patterns, local_files_only=not download)
        if not list(Path(folder).glob("model*.safetensors")):
            folder = snapshot_download(name, allow_patterns=["pytorch_model*.bin"], local_files_only=not download)
    except Exception as error:  # errors of huggingface_hub, httpx and the operating system
        raise ModelError(
            f"{name} is not a local folder, and cannot be loaded from the Hugging Face hub: {first_line(error)}"
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
    """Load the causal language model in a folder, or a preset with random weights, partitioned over the ranks.

    Each rank reads only its own shards, and needs at most the memory of one full tensor in addition to them. No rank
    waits for another.

    Args:
        seed: the seed of a preset's weights and of new rows; both are equal for any world size.
        free_host_bytes: see ``zero3.partition``.
        stored_rows: the number of embedding rows in the folder, if ``config`` has more; by default the same number.
        new_rows: the initialization of the additional rows.

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
        before = meta_model(config_before_resize(config, stored_rows), dtype, trust_remote_code)
        sources = extend_embeddings(model, _sources(name, before, trust_remote_code), new_rows, seed)
    for buffer_name in saved_buffers(model):
        if buffer_name in sources:
            _set_buffer(model, buffer_name, sources[buffer_name].read_whole())
    return _fill(
        model, ds_config, dtype, lambda shard: sources[shard.name].copy_flat(shard.start, shard.data), free_host_bytes
    )


def _sources(name: str, model: PreTrainedModel, trust_remote_code: bool) -> dict[str, Source]:
    multimodal = multimodal_config(name, model.config, trust_remote_code)
    if multimodal is None:
        return find_sources(model, Path(name))
    model_class = getattr(transformers, multimodal.architectures[0])
    return find_text_sources(model, meta_model_of_class(model_class, multimodal, model.dtype), Path(name))


def empty_model(
    config: PretrainedConfig,
    ds_config: dict[str, Any],
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    fill: Callable[[Shard], Any] = lambda shard: None,
    free_host_bytes: int | None = None,
) -> PreTrainedModel:
    """Build the model partitioned over the ranks, with uninitialized shards and buffers for a checkpoint to fill.

    Args:
        fill: writes to each shard, which is of ``dtype`` even if it is converted to another format afterwards.
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
    device = compute_device()
    for buffer in model.buffers():  # the engine moves the buffers only of models that it partitions itself
        buffer.data = buffer.data.to(device)
    return model.train()
