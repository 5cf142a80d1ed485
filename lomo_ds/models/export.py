"""ZeRO-3 shards into a Hugging Face folder that plain transformers loads."""

import shutil
from pathlib import Path

import deepspeed.comm as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lomo_ds import zero3


def save_pretrained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, configuration and tokenizer into ``folder``; every rank calls it, rank 0 writes.

    Parameters are gathered one at a time. All files are written aside and moved into place when whole.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with zero3.gathered([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        weights |= {name: buffer for name, buffer in model.state_dict().items() if name in dict(model.named_buffers())}
        partial = folder / ".saving"
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        for file in sorted(partial.iterdir(), key=lambda file: file.suffix == ".json"):  # the index after its parts
            file.replace(folder / file.name)
        partial.rmdir()
    dist.barrier()
