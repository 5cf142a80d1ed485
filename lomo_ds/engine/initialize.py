"""``lomo_ds.initialize``: the arguments of ``deepspeed.initialize``, checked and turned into a LomoEngine."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import TORCH_DISTRIBUTED_DEFAULT_PORT
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from torch.nn import Module
from torch.utils.data import Dataset

from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.config.validation import unused_fields, validate_ds_config
from lomo_ds.distributed.process_group import start_process_group
from lomo_ds.engine.base import outside_zero_init
from lomo_ds.engine.client_arguments import (
    validate_model_parameters,
    validate_scheduler_factory,
    validate_training_data,
)
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.engine.lomo import LomoEngine
from lomo_ds.engine.optimizer import LomoOptimizer
from lomo_ds.errors import ConfigError, one_line

logger = logging.getLogger(__name__)


def initialize(
    args: Any = None,
    model: Module | None = None,
    optimizer: None = None,
    model_parameters: Iterable[Any] | None = None,
    training_data: Dataset[Any] | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    distributed_port: int = TORCH_DISTRIBUTED_DEFAULT_PORT,
    mpu: None = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: str | dict[str, Any] | None = None,
    mesh_param: None = None,
    config_params: str | dict[str, Any] | None = None,
) -> tuple[LomoEngine, LomoOptimizer, Any, Any]:
    """Build an engine that updates during backward, with the arguments and results of ``deepspeed.initialize``.

    Args:
        model: the model to train. Its parameters are partitioned over the ranks here, unless ``deepspeed.zero.Init``
            has already partitioned them.
        optimizer, mpu, mesh_param: must be None. ``config`` selects the optimizer, and all ranks are data-parallel.
        model_parameters: the parameters to train, as tensors or as param groups with their own ``lr``,
            ``weight_decay`` and ``type``, an optimizer's name; None trains all parameters.
        lr_scheduler: a function that builds a scheduler for the optimizer passed to it. An existing scheduler is
            refused because it is bound to another optimizer.
        config: a DeepSpeed config (path or dict) with ``"optimizer": {"type": "LOMO", ...}``, or another type of
            ``OPTIMIZERS``, and ZeRO stage 3; see ``LomoConfig`` for the optimizer's parameters.

    Returns:
        (engine, optimizer, training dataloader or None, learning-rate scheduler or None)

    Raises:
        ConfigError: an argument or a setting is invalid or not supported.
    """
    with outside_zero_init():
        for name, value in (("optimizer", optimizer), ("mpu", mpu), ("mesh_param", mesh_param)):
            if value is not None:
                raise ConfigError(
                    f"lomo_ds.initialize takes no {name}, got {type(value).__name__}; name the optimizer in the "
                    "DeepSpeed config, and leave every rank data-parallel"
                )
        if model is None:
            raise ConfigError("lomo_ds.initialize needs a model, got None")
        model_parameters = validate_model_parameters(model, model_parameters)
        validate_scheduler_factory(lr_scheduler)
        validate_training_data(training_data, collate_fn)
        ds_config = complete_ds_config(load_config(args, config, config_params))
        validate_ds_config(ds_config)
        _join_process_group(distributed_port, dist_init_required)
        ds_config = complete_ds_config(ds_config, torch.distributed.get_world_size())
        validate_ds_config(ds_config)  # again, because the world size may determine the accumulation steps
        if torch.distributed.get_rank() == 0 and (idle := unused_fields(ds_config)):
            logger.info("lomo_ds ignores these fields of the DeepSpeed config: %s", ", ".join(idle))
        engine = LomoEngine(
            args=args,
            model=model,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=ds_config,
            config_class=parse_ds_config(ds_config),
        )
    return engine, engine.optimizer, engine.training_dataloader, engine.lr_scheduler


def _join_process_group(distributed_port: int, dist_init_required: bool | None) -> None:
    if dist_init_required is not False and not torch.distributed.is_initialized():
        start_process_group()  # works without a launcher; DeepSpeed's own initialization would look for MPI
    dist.init_distributed(
        dist_backend=get_accelerator().communication_backend_name(),
        distributed_port=distributed_port,
        dist_init_required=dist_init_required,
    )


def load_config(args: Any, config: Any, config_params: Any) -> dict[str, Any]:
    """Return the one DeepSpeed config among the arguments of ``initialize``, read from its file if it is a path.

    Raises:
        ConfigError: there is no config, there are several, or the file cannot be read.
    """
    sources = [c for c in (config, config_params, getattr(args, "deepspeed_config", None)) if c is not None]
    if len(sources) != 1:
        raise ConfigError(f"give one DeepSpeed config, as config= or in args.deepspeed_config, got {len(sources)}")
    source = sources[0]
    if isinstance(source, dict):
        return source
    try:
        loaded = load_ds_config(source)
    except Exception as error:  # JSON readers and decoders raise many types
        raise ConfigError(f"the DeepSpeed config {one_line(source)} cannot be read: {one_line(error)}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the DeepSpeed config {one_line(source)} must hold a JSON object, got {type(loaded).__name__}"
        )
    return loaded
