"""A causal language model that computes its loss without its logits, for batches whose logits would not fit.

ZeRO-3 gathers ``lm_head.weight`` around the forward of ``lm_head`` alone, so that is where the loss is computed.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import pad
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from lomo_ds.data.packing import IGNORE_INDEX
from lomo_ds.errors import ModelError
from lomo_ds.models.tiled_loss import TILE_BYTES, tiled_cross_entropy


def tile_logits(model: PreTrainedModel, tile_bytes: int = TILE_BYTES) -> None:
    """Let ``model``, called with labels, compute its loss a tile of logits at a time, and return none of them.

    To be called before ``lomo_ds.initialize``. The loss and its gradients are the same up to rounding, and so are the
    names of parameters; without labels the model does what it always did.

    Args:
        tile_bytes: the most that the logits in memory take at a time, in fp32.

    Raises:
        ModelError: the model does something else with its logits than transformers' LLaMA.
    """
    reason = _refusal(model)
    if reason is not None:
        raise ModelError(
            "tiled logits need a model that computes its loss as transformers' LlamaForCausalLM does, and Mistral, "
            f"Qwen2, Qwen3, Gemma, OLMo 2, Phi-3 and more do, got {type(model).__name__}, {reason}; train it without"
        )
    model.lm_head = TiledHead(model.lm_head, tile_bytes)
    model.forward = MethodType(_forward, model)


def can_tile_logits(model: PreTrainedModel) -> bool:
    """Whether ``tile_logits`` would take ``model``."""
    return _refusal(model) is None


class TiledHead(Linear):
    """A linear layer that returns the loss of its logits instead of them, where it is given labels.

    Args:
        head: the layer whose parameters it takes over.
        tile_bytes: see ``tile_logits``.
    """

    def __init__(self, head: Linear, tile_bytes: int) -> None:
        super().__init__(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)
        self.tile_bytes = tile_bytes

    def forward(self, input: Tensor, labels: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
        """The logits of ``input``; or with ``labels``, one of each row of it, the sum of their cross-entropies."""
        if labels is None:
            return super().forward(input)
        return tiled_cross_entropy(
            input.flatten(0, -2), self.weight, self.bias, labels.flatten(), ignore_index, self.tile_bytes
        )


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
    """transformers' LlamaForCausalLM.forward, whose arguments these are; with labels, without logits."""
    inputs = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": position_ids,
        "past_key_values": past_key_values,
        "inputs_embeds": inputs_embeds,
        "use_cache": use_cache,
        **kwargs,
    }
    if labels is None or isinstance(logits_to_keep, Tensor) or logits_to_keep:
        return type(self).forward(self, **inputs, labels=labels, logits_to_keep=logits_to_keep)
    outputs = self.model(**inputs)
    return CausalLMOutputWithPast(
        loss=_loss(self.lm_head, outputs.last_hidden_state, labels, **kwargs),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _loss(
    head: TiledHead,
    hidden: Tensor,
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss, whose arguments these are."""
    if shift_labels is None:
        shift_labels = pad(labels, (0, 1), value=ignore_index)[..., 1:]
    shift_labels = shift_labels.to(hidden.device)
    if num_items_in_batch is None:
        num_items_in_batch = (shift_labels != ignore_index).sum()
    elif isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(hidden.device)
    return head(hidden, labels=shift_labels, ignore_index=ignore_index) / num_items_in_batch


def _refusal(model: PreTrainedModel) -> str | None:
    """Why the logits of ``model`` cannot be tiled; None if they can."""
    if "forward" in vars(model) or _codes(type(model).forward) != _codes(LlamaForCausalLM.forward):
        return "which has a forward of its own"
    if type(model.lm_head) is not Linear:
        return f"whose lm_head is a {type(model.lm_head).__name__} and no torch.nn.Linear"
    if model.loss_function is not ForCausalLMLoss:
        return f"whose loss_function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None


def _codes(function: Callable[..., Any] | None) -> list[tuple[Any, ...]]:
    """The instructions of a function and of those it wraps: equal for two that do the same.

    transformers gives every model a file of its own, and most dense ones a copy of LLaMA's forward in it.
    """
    found = []
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None:
            return [(function,)]
        found.append((code.co_code, code.co_names, code.co_varnames, code.co_consts[1:]))  # the first is its docstring
        function = getattr(function, "__wrapped__", None)
    return found
