"""Validation of the objects passed to ``initialize``: parameters, scheduler and training data."""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lomo_ds.errors import ConfigError, did_you_mean

GROUP_KEYS = ["params", "lr", "weight_decay", "type", "name", "initial_lr", "param_names"]
SCHEDULER_HINT = (
    "give a function of the optimizer, such as lr_scheduler=lambda optimizer: StepLR(optimizer, 1, gamma=0.1)"
)


def validate_model_parameters(model: Module, model_parameters: Iterable[Any] | None) -> list[Any] | None:
    """Validate ``model_parameters`` and return it as a list of tensors or param groups; None selects all parameters.

    Raises:
        ConfigError: a tensor is not a parameter of ``model``, or a param group has an invalid setting.
    """
    if model_parameters is None:
        return None
    if isinstance(model_parameters, Tensor | dict | str | Module):
        raise ConfigError(
            f"model_parameters must be a list of the model's parameters, or of param groups, got a "
            f"{type(model_parameters).__name__}; give model.parameters(), or leave it out"
        )
    parameters = list(model_parameters)
    model_ids = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = set()
    for group in parameters if any(isinstance(item, dict) for item in parameters) else [{"params": parameters}]:
        if isinstance(group, dict) and "params" in group:
            group["params"] = _as_list(group["params"])  # a generator can be read only once
        for tensor in _tensors_of(group):
            _validate_tensor(tensor, model_ids, seen)
    if not seen:
        raise ConfigError("model_parameters holds no parameter; leave it out to train all parameters of the model")
    return parameters


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def _tensors_of(group: Any) -> list[Any]:
    if not isinstance(group, dict) or "params" not in group:
        raise ConfigError(f'a group of model_parameters must be a dict with "params", got {_describe(group)}')
    for name, value in group.items():
        if name not in GROUP_KEYS:
            raise ConfigError(
                f"a group of model_parameters may set lr, weight_decay and type, got {name!r}"
                f"{did_you_mean(str(name), GROUP_KEYS)}"
            )
        if name in ("lr", "weight_decay") and not (_is_number(value) and 0 <= value < math.inf):
            raise ConfigError(f"{name} of a group of model_parameters must be a number of at least 0, got {value!r}")
    return [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in group["params"]]


def _is_number(value: Any) -> bool:
    is_scalar = isinstance(value, Tensor) and value.numel() == 1
    return is_scalar or (isinstance(value, int | float) and not isinstance(value, bool))


def _validate_tensor(tensor: Any, model_ids: set[int], seen: set[int]) -> None:
    if not isinstance(tensor, Tensor):
        raise ConfigError(f"model_parameters must hold parameters of the model, got {_describe(tensor)}")
    if id(tensor) not in model_ids:
        raise ConfigError(
            f"model_parameters holds a tensor of shape {list(tensor.shape)} that is not a parameter of the model; take "
            "the parameters from the model passed to initialize, after the last change to it"
        )
    if id(tensor) in seen:
        raise ConfigError(f"model_parameters holds a parameter of shape {list(tensor.shape)} twice; list each once")
    seen.add(id(tensor))


def validate_scheduler_factory(lr_scheduler: Any) -> None:
    """Raise unless ``lr_scheduler`` is None or a function that builds a scheduler.

    Raises:
        ConfigError: ``lr_scheduler`` is not callable, for example a scheduler bound to another optimizer.
    """
    if lr_scheduler is not None and not callable(lr_scheduler):
        raise ConfigError(
            f"lr_scheduler must be a function, got a {type(lr_scheduler).__name__}, which acts on another optimizer; "
            f"{SCHEDULER_HINT}"
        )


def validate_built_scheduler(scheduler: Any, optimizers: Iterable[Any]) -> None:
    """Raise unless the built scheduler is bound to one of the engine's ``optimizers``.

    Raises:
        ConfigError: it has no ``step``, or it is bound to another optimizer.
    """
    if not callable(getattr(scheduler, "step", None)):
        raise ConfigError(
            f"lr_scheduler must return a scheduler with step(), got {_describe(scheduler)}; {SCHEDULER_HINT}"
        )
    bound = getattr(scheduler, "optimizer", None)
    if bound is not None and not any(bound is optimizer for optimizer in optimizers):
        raise ConfigError(
            f"lr_scheduler returned a {type(scheduler).__name__} that acts on another {type(bound).__name__} instead "
            f"of the optimizer passed to it; {SCHEDULER_HINT}"
        )


def needs_metric(scheduler: Any) -> bool:
    """Return whether ``scheduler.step`` needs a metric, for which DeepSpeed would pass the batch size."""
    if scheduler is None:
        return False
    parameters = inspect.signature(scheduler.step).parameters.values()
    return any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def validate_training_data(training_data: Any, collate_fn: Callable[..., Any] | None) -> None:
    """Raise unless ``training_data`` is a non-empty dataset and ``collate_fn`` a function, or they are None.

    Raises:
        ConfigError: an argument is invalid; DeepSpeed would ignore it or fail later with an unclear message.
    """
    if collate_fn is not None and not callable(collate_fn):
        raise ConfigError(f"collate_fn must be a function, got {_describe(collate_fn)}")
    if training_data is None:
        return
    if isinstance(training_data, torch.utils.data.DataLoader):
        raise ConfigError("training_data must be a dataset, got a DataLoader; give its .dataset, or iterate over it")
    has_items = hasattr(training_data, "__getitem__") and hasattr(training_data, "__len__")
    if isinstance(training_data, str) or not has_items:
        raise ConfigError(
            f"training_data must be a dataset with __getitem__ and __len__, got {_describe(training_data)}"
        )
    if len(training_data) == 0:
        raise ConfigError(f"training_data must not be empty, got an empty {type(training_data).__name__}")


def _describe(value: Any) -> str:
    return repr(value) if value is None or isinstance(value, str) else f"a {type(value).__name__}"
