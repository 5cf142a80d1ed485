"""Objects of a caller's own that ``initialize`` takes: parameters, a scheduler, data. Each acts, or is refused."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lomo_ds.errors import ConfigError, did_you_mean

GROUP_KEYS = ["params", "lr", "weight_decay", "name", "initial_lr", "param_names"]
WAY_OUT = "give a function of the optimizer, such as lr_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.1)"


def validate_model_parameters(model: Module, given: Iterable[Any] | None) -> list[Any] | None:
    """``model_parameters`` as a list of tensors or of groups; None for all of the model's.

    Raises:
        ConfigError: it names what ``model`` does not have, or settings that LOMO does not have.
    """
    if given is None:
        return None
    if isinstance(given, Tensor | dict | str | Module):
        raise ConfigError(
            f"model_parameters must be a list of the model's parameters, or of groups of them, got a "
            f"{type(given).__name__}; give model.parameters(), or leave it out"
        )
    parameters = list(given)
    own = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    for group in parameters if any(isinstance(item, dict) for item in parameters) else [{"params": parameters}]:
        if isinstance(group, dict) and "params" in group:
            group["params"] = _as_list(group["params"])  # a generator is read but once
        for tensor in _tensors_of(group):
            _validate_tensor(tensor, own, seen)
    if not seen:
        raise ConfigError("model_parameters holds no parameter; leave it out to train all of the model's")
    return parameters


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _tensors_of(group: Any) -> list[Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise ConfigError(f'a group of model_parameters must be a dict with "params", got {_told(group)}')
    for name, value in group.items():
        if name not in GROUP_KEYS:
            raise ConfigError(
                f"a group of model_parameters may set lr and weight_decay, got {name!r}"
                f"{did_you_mean(str(name), GROUP_KEYS)}"
            )
        if name in ("lr", "weight_decay") and not (_is_number(value) and 0 <= value < math.inf):
            raise ConfigError(f"{name} of a group of model_parameters must be a number of at least 0, got {value!r}")
    return [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in group["params"]]


def _is_number(value: Any) -> bool:
    is_scalar = isinstance(value, Tensor) and value.numel() == 1
    return is_scalar or (isinstance(value, int | float) and not isinstance(value, bool))


def _validate_tensor(tensor: Any, own: set[int], seen: set[int]) -> None:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"model_parameters must hold parameters of the model, got {_told(tensor)}")
    if id(tensor) not in own:
        raise ConfigError(
            f"model_parameters holds a tensor of shape {list(tensor.shape)} that is no parameter of the model; take "
            "them from the model that is given, after the last change to it"
        )
    if id(tensor) in seen:
        raise ConfigError(f"model_parameters holds a parameter of shape {list(tensor.shape)} twice; name each once")
    seen.add(id(tensor))


def validate_scheduler_factory(given: Any) -> None:
    """``lr_scheduler`` must build a scheduler once the parameter groups that it acts on are made.

    Raises:
        ConfigError: it is a scheduler already, of another optimizer.
    """
    if given is not None and not callable(given):
        raise ConfigError(f"lr_scheduler got a {type(given).__name__}, which acts on another optimizer; {WAY_OUT}")


def validate_built_scheduler(scheduler: Any, optimizers: Iterable[Any]) -> None:
    """A scheduler that was built must act on the engine's parameter groups.

    Raises:
        ConfigError: it does not, or is none.
    """
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigError(f"lr_scheduler must return a scheduler with step(), got {_told(scheduler)}; {WAY_OUT}")
    bound = getattr(scheduler, "optimizer", None)
    if bound is not None and not any(bound is optimizer for optimizer in optimizers):
        raise ConfigError(
            f"lr_scheduler returned a {type(scheduler).__name__} that acts on a {type(bound).__name__} of its own, and "
            f"not on the optimizer it was given; {WAY_OUT}"
        )


def needs_metric(scheduler: Any) -> bool:
    """Whether a scheduler steps by a figure of the caller's, for which DeepSpeed would give it the batch size."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)


def validate_training_data(training_data: Any, collate_fn: Callable[..., Any] | None) -> None:
    """``training_data`` must be a dataset with something in it, and ``collate_fn`` a function.

    Raises:
        ConfigError: DeepSpeed would ignore it, or fail in its own words.
    """
    if collate_fn is not None and not callable(collate_fn):
        raise ConfigError(f"collate_fn must be a function, got {_told(collate_fn)}")
    if training_data is None:
        return
    if isinstance(training_data, torch.utils.data.DataLoader):
        raise ConfigError("training_data must be a dataset, got a DataLoader; give its .dataset, or iterate over it")
    has_items = hasattr(training_data, "__getitem__") and hasattr(training_data, "__len__")
    if isinstance(training_data, str) or not has_items:
        raise ConfigError(f"training_data must be a dataset with __getitem__ and __len__, got {_told(training_data)}")
    if len(training_data) == 0:
        raise ConfigError(f"training_data must hold something, got an empty {type(training_data).__name__}")


def _told(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"
