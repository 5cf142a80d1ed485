"""Packed rows: several documents in one row, whose tokens must not attend to each other.

``position_ids`` that restart tell transformers models where a document begins. They act on it only without an attention
mask and without a key-value cache, which a forward makes by default; flash attention does only for a single row.
"""

import inspect
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from lomo_ds.models.attention import document_boundaries


class PackedRows:
    """Hooks that make the transformers models in a module keep the documents of packed rows apart.

    A forward makes no cache unless it is asked to, as ``generate`` does, and tells flash attention where documents
    begin.
    """

    def __init__(self, model: Module) -> None:
        self.handles = [
            module.register_forward_pre_hook(partial(_separate, _parameters(module)), with_kwargs=True)
            for module in model.modules()
            if isinstance(module, PreTrainedModel) and "use_cache" in _parameters(module)
        ]

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()


def _parameters(module: Module) -> dict[str, Any]:
    return dict(inspect.signature(module.forward).parameters)


def _separate(
    parameters: dict[str, Any], module: PreTrainedModel, arguments: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Complete the arguments of a forward; those that the caller gave stay as they are."""
    by_position = dict(zip(parameters, arguments, strict=False))
    if "use_cache" not in by_position and inputs.get("use_cache") is None:
        inputs = inputs | {"use_cache": False}
    named = by_position | inputs
    if not named["use_cache"] and _needs_boundaries(module, parameters, named):
        inputs = inputs | document_boundaries(_position_ids_of_all_rows(named))
    return arguments, inputs


def _needs_boundaries(module: PreTrainedModel, parameters: dict[str, Any], named: dict[str, Any]) -> bool:
    position_ids = named.get("position_ids")
    return (
        is_flash_attention_requested(module.config)
        and isinstance(position_ids, Tensor)
        and position_ids.dim() == 2
        and named.get("attention_mask") is None
        and all(named.get(name) is None for name in ("cache", "past_key_values", "cu_seq_lens_q"))
        and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    )


def _position_ids_of_all_rows(named: dict[str, Any]) -> Tensor:
    tokens = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
    return named["position_ids"].expand(tokens.shape[0], -1)
