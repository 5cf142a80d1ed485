"""A Hugging Face folder into ZeRO-3 shards, one tensor whole at a time."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from lomo_ds import zero3
from lomo_ds.errors import ModelError

NAMED_AT_MOST = 10  # in a message that lists tensors


def load_config(folder: str) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ModelError: ``folder`` is no model folder.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ModelError(
            f"a model is read from a local folder that holds a config.json, got {folder}, which has none; download a "
            "hub model first, with `hf download NAME --local-dir FOLDER`"
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{folder}/config.json is not a model configuration: {_first_line(error)}") from None


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ModelError(f"{folder} holds no tokenizer that transformers can read: {_first_line(error)}") from None


def load_model(folder: str, config: PretrainedConfig, ds_config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in ``folder``, its parameters split over the ranks.

    Rank 0 reads the files, one tensor at a time; no rank ever holds more than its shards and one whole tensor.

    Raises:
        ModelError: weights are missing, unexpected, of another shape or unreadable; raised on every rank.
    """
    with no_init_weights():  # memory that nobody writes to is never taken
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    with _open_weights(folder) as weights:
        _refuse_mismatch(folder, parameters | buffers, weights, model)
        for name, buffer in buffers.items():
            buffer.copy_(weights[name].get_tensor(name))
        for name, parameter in zip(parameters, zero3.partition(parameters.values(), ds_config, dtype), strict=True):
            if dist.get_rank() == 0:
                parameter.data = weights[name].get_tensor(name).to(dtype)
    device = get_accelerator().current_device_name()
    for buffer in model.buffers():  # rotary frequencies: the engine moves only what it partitions itself
        buffer.data = buffer.data.to(device)
    return model.train()


@contextmanager
def _open_weights(folder: str) -> Iterator[dict[str, Any]]:
    """Every tensor's name with the opened file that holds it."""
    files = _weight_files(Path(folder))
    opened: dict[str, Any] = {}
    try:
        for file in files:
            reader = safe_open(file, framework="pt")
            opened |= dict.fromkeys(reader.keys(), reader)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {_first_line(error)}") from None
    yield opened


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ModelError(
        f"a model folder must hold model.safetensors, or its parts and their index, got {folder}, which has none"
        + ("; convert its .bin files with transformers' save_pretrained" if list(folder.glob("*.bin")) else "")
    )


def _refuse_mismatch(folder: str, wanted: dict[str, Tensor], weights: dict[str, Any], model: PreTrainedModel) -> None:
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    tied = set(getattr(model, "all_tied_weights_keys", ()))
    # what older checkpoints hold beside the weights; transformers drops it too
    dropped = re.compile("|".join([r"rotary_emb\.inv_freq$", *(model._keys_to_ignore_on_load_unexpected or ())]))
    problems = {
        "are missing": [name for name in shapes if name not in weights],
        "are unexpected": [name for name in weights if name not in tied | shapes.keys() and not dropped.search(name)],
        "have another shape": [
            f"{name} {tuple(weights[name].get_slice(name).get_shape())} for {tuple(shape)}"
            for name, shape in shapes.items()
            if name in weights and tuple(weights[name].get_slice(name).get_shape()) != tuple(shape)
        ],
    }
    told = [f"{_some(names)} {what}" for what, names in problems.items() if names]
    if told:
        raise ModelError(f"the weights in {folder} do not fit its config.json: {'; '.join(told)}")


def _some(names: list[str]) -> str:
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
