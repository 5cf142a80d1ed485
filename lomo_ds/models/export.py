"""ZeRO-3 shards into a Hugging Face folder that plain transformers loads."""

import shutil
from pathlib import Path

import deepspeed.comm as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lomo_ds import zero3
from lomo_ds.distributed import together
from lomo_ds.errors import ModelError


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, configuration and tokenizer into ``folder``; every rank calls it, rank 0 writes.

    Parameters are gathered one at a time. All files are written aside and moved into place when whole.

    Raises:
        ModelError: ``folder`` cannot be written; on rank 0, the others raise ``PeerError``.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with zero3.gathered([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    together(lambda: _write(model, weights, tokenizer, folder) if dist.get_rank() == 0 else None)


def _write(
    model: PreTrainedModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    saved = model.state_dict().keys()
    weights |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    partial = folder / ".saving"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        whole = sorted(partial.iterdir(), key=lambda file: file.suffix == ".json")  # an index after its parts
        for file in whole:
            file.replace(folder / file.name)
        partial.rmdir()
        for stale in set(folder.glob("model*.safetensors*")) - {folder / file.name for file in whole}:
            stale.unlink()  # of an earlier save in more parts, or fewer
    except OSError as error:
        raise ModelError(f"the model cannot be written to {folder}: {error.strerror or error}") from error
