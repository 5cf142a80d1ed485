"""Computation of a causal language model's loss in tiles of its logits, for batches whose full logits do not fit.

ZeRO-3 gathers ``lm_head.weight`` only around the forward of ``lm_head``, so the loss is computed there.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import pad
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.errors import ModelError
from lomo_ds.models.replaced_forward import replaced_forward
from lomo_ds.models.tiled_loss import TILE_BYTES, tiled_cross_entropy


def tile_logits(model: PreTrainedModel, tile_bytes: int = TILE_BYTES) -> None:
    """Change ``model`` so that with labels it computes its loss one tile of logits at a time and returns no logits.

    Call this before ``lomo_ds.initialize``. The loss and its gradients stay the same up to rounding, and the names of
    parameters do not change. Without labels, the model behaves as before.

    Args:
        tile_bytes: the largest size of the fp32 logits in memory at any time.

    Raises:
        ModelError: the model does not compute its loss from logits like transformers' LLaMA.
    """
    reason = reason_not_tileable(model)
    if reason is not None:
        raise ModelError(
            "tiled logits need a model that computes its loss like transformers' LlamaForCausalLM (Mistral, Qwen2, "
            f"Qwen3, Gemma, OLMo 2, Phi-3 and others do), got {type(model).__name__}, {reason}; train it without"
        )
    model.lm_head = TiledHead(model.lm_head, tile_bytes)
    model.forward = MethodType(_forward, model)


@contextmanager
def tiled_logits(model: PreTrainedModel, tile_bytes: int = TILE_BYTES) -> Iterator[None]:
    """Compute the loss of ``model`` as ``tile_logits`` does, until the context ends."""
    if is_tiled(model):
        yield
        return
    head = partial(_head_forward, model.lm_head, tile_bytes)
    with replaced_forward(model, MethodType(_forward, model)), replaced_forward(model.lm_head, head):
        yield


def is_tiled(model: PreTrainedModel) -> bool:
    """Return whether ``tile_logits`` has changed ``model``."""
    return isinstance(getattr(model, "lm_head", None), TiledHead)


def can_tile_logits(model: PreTrainedModel) -> bool:
    """Return whether ``tile_logits`` supports ``model``."""
    return reason_not_tileable(model) is None


class TiledHead(Linear):
    """A linear layer that, if it gets labels, returns the loss of its logits instead of the logits.

    Args:
        head: the layer whose parameters it uses.
        tile_bytes: see ``tile_logits``.
    """

    def __init__(self, head: Linear, tile_bytes: int) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)
        self.tile_bytes = tile_bytes

    def forward(self, input: Tensor, labels: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """Return the logits of ``input``, or the sum of their cross-entropies with ``labels`` (one for each row)."""
        return _head_forward(self, self.tile_bytes, input, labels, ignore_index)


def _head_forward(
    head: Linear, tile_bytes: int, input: Tensor, labels: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Run the forward of a ``TiledHead``."""
    if labels is None:
        return Linear.forward(head, input)
    return tiled_cross_entropy(input.flatten(0, -2), head.weight, head.bias, labels.flatten(), ignore_index, tile_bytes)


@can_return_tuple
def _forward(
    self: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    labels: Tensor | None = None,
    use_cache: bool | None = None,
    logits_to_keep: int | Tensor = 0,
    **kwargs: Any,
) -> CausalLMOutputWithPast:
    """Do the same as transformers' LlamaForCausalLM.forward, but return no logits if there are labels."""
    named = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
    }
    # transformers warns about deprecated names even if they are None
    inputs = {name: value for name, value in named.items() if value is not None} | kwargs
    if labels is None or isinstance(logits_to_keep, Tensor) or logits_to_keep:
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep)
    outputs = self.model(**inputs)
    others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
    return CausalLMOutputWithPast(loss=_loss(self.lm_head, outputs.last_hidden_state, labels, **kwargs), **others)


def _loss(
    head: Linear,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Compute the loss like transformers' ForCausalLMLoss, with the same arguments."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return head(hidden, labels=shift_labels, ignore_index=ignore_index) / num_items_in_batch


def reason_not_tileable(model: PreTrainedModel) -> str | None:
    """Return the reason why the logits of ``model`` cannot be tiled, or None if they can."""
    if _is_patched(type(model)):
        return "whose forward was replaced"
    if "forward" in vars(model) or _bytecode(type(model).forward) != _bytecode(LlamaForCausalLM.forward):
        return "which has a forward of its own"
    if type(model.lm_head) is not Linear:
        return f"whose lm_head is a {type(model.lm_head).__name__} and not a torch.nn.Linear"
    if model.loss_function is not ForCausalLMLoss:
        return f"whose loss_function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None


def _is_patched(model_class: type[PreTrainedModel]) -> bool:
    """Return whether a program has replaced the forward of a class, such as LLaMA's, by a function of another file."""
    owner = next(base for base in model_class.__mro__ if "forward" in vars(base))
    return inspect.unwrap(vars(owner)["forward"]).__module__ != owner.__module__


def _bytecode(function: Callable[..., Any] | None) -> list[tuple[Any, ...]]:
    """Return the bytecode of a function and of the functions it wraps, which is equal for copies of a function.

    transformers has a separate file for every model, and most dense models have a copy of LLaMA's forward in it.
    """
    bytecode = []
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return [(function,)]
        bytecode.append((code.co_code, code.co_names, code.co_varnames, code.co_consts[1:]))  # without the docstring
        function = getattr(function, "__wrapped__", None)
    return bytecode
