"""``lomo_ds.install``: programs that call ``deepspeed.initialize`` train with LomoEngine where their config says so."""

import copy
import inspect
import logging
from contextlib import AbstractContextManager
from typing import Any

import deepspeed

from lomo_ds.config.lomo_config import OPTIMIZERS
from lomo_ds.config.sections import value_at
from lomo_ds.distributed.process_group import is_main_process
from lomo_ds.engine.initialize import initialize, load_config
from lomo_ds.errors import ConfigError

logger = logging.getLogger(__name__)


def install() -> "Installation":
    """Replace ``deepspeed.initialize``, so that every program that calls it can train with LOMO or AdaLomo.

    A DeepSpeed config whose optimizer is one of ``OPTIMIZERS`` gets a ``LomoEngine``; every other config gets
    DeepSpeed's own engine. Call it before the program builds its engine. A second call changes nothing.

    Returns:
        A context manager that restores ``deepspeed.initialize`` at its end. It need not be used.
    """
    if isinstance(deepspeed.initialize, _Initialize):
        return Installation(None)
    replacement = _Initialize(deepspeed.initialize)
    deepspeed.initialize = replacement
    if is_main_process():
        names = " or ".join(kind.type_name for kind in OPTIMIZERS.values())
        logger.info("deepspeed.initialize trains with lomo_ds if the optimizer of the DeepSpeed config is %s", names)
    return Installation(replacement)


class Installation(AbstractContextManager["Installation"]):
    """Undoes ``install`` when its ``with`` block ends.

    Args:
        replacement: what stands for ``deepspeed.initialize``; None if an earlier ``install`` has put it there.
    """

    def __init__(self, replacement: "_Initialize | None") -> None:
        self.replacement = replacement

    def __exit__(self, *exception: object) -> None:
        if self.replacement is not None and deepspeed.initialize is self.replacement:
            deepspeed.initialize = self.replacement.original


class _Initialize:
    """``deepspeed.initialize`` with one more choice of engine.

    Args:
        original: DeepSpeed's function.
    """

    def __init__(self, original: Any) -> None:
        self.original = original
        self.signature = inspect.signature(original)
        self.__doc__ = original.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
        arguments = self.signature.bind(*args, **kwargs).arguments
        optimizer = _optimizer_type(arguments)
        if optimizer.lower() not in OPTIMIZERS:
            _log_original(optimizer, arguments.get("optimizer"))
            return self.original(*args, **kwargs)
        engine, *others = initialize(**_accumulating_in_stash(arguments))
        engine.checkpoint_name = deepspeed_checkpoint_name
        return engine, *others


def deepspeed_checkpoint_name(step: int) -> str:
    """Return DeepSpeed's name for a checkpoint, which programs for DeepSpeed look for."""
    return f"global_step{step}"


def _accumulating_in_stash(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``initialize`` with accumulation in the stash, unless the config asks for another.

    Programs for DeepSpeed call ``engine.backward`` for each micro-batch, which layered accumulation cannot do.
    """
    name = next((name for name in ("config", "config_params") if arguments.get(name) is not None), None)
    if name is None:  # the config is in ``args``; the engine finds out when it gets the first micro-batch
        return arguments
    config = copy.deepcopy(load_config(None, arguments[name], None))
    params = config["optimizer"].setdefault("params", {})
    if params.get("accumulation", "auto") == "auto" and params.get("update_schedule", "auto") in ("auto", "stash"):
        params["accumulation"] = "stash"
    return arguments | {name: config}


def _optimizer_type(arguments: dict[str, Any]) -> str:
    """Return the type of the optimizer in the DeepSpeed config; empty if there is none."""
    try:
        config = load_config(*(arguments.get(name) for name in ("args", "config", "config_params")))
    except ConfigError:  # DeepSpeed says itself what is wrong
        return ""
    return str(value_at(config, "optimizer.type") or "")


def _log_original(optimizer_type: str, client_optimizer: Any) -> None:
    """Log which optimizer DeepSpeed's own engine has, with a warning if no config names it: it may be a default."""
    if not is_main_process():
        return
    if client_optimizer is not None and not optimizer_type:
        logger.warning(
            "DeepSpeed's own engine trains with %s, because the DeepSpeed config has no optimizer; to train with "
            'LOMO, write "optimizer": {"type": "LOMO", "params": {"lr": "auto"}}', type(client_optimizer).__name__,
        )  # fmt: skip
    else:
        logger.info("DeepSpeed's own engine takes the optimizer %s", optimizer_type or "none")
