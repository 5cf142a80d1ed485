"""The model and the engine of a training job, built on all ranks from its inputs and its starting point."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, get_scheduler

from lomo_ds.checkpoint import MODEL
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_config import warmup_steps
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.engine.baseline import initialize_baseline
from lomo_ds.engine.initialize import initialize
from lomo_ds.engine.protocol import TrainingEngine
from lomo_ds.memory.budget import free_bytes
from lomo_ds.models import (
    add_stop_token,
    can_tile_logits,
    empty_model,
    load_generation_config,
    load_model,
    recompute_activations,
    tile_logits,
    verify_export,
)
from lomo_ds.numerics.precision import DTYPES
from lomo_ds.train.checkpoint_manager import CheckpointManager, NoCheckpoints, RunCheckpoints
from lomo_ds.train.inputs import Inputs
from lomo_ds.train.starting_point import StartingPoint

logger = logging.getLogger(__name__)


def build_model(inputs: Inputs, start: StartingPoint) -> PreTrainedModel:
    """Build the model, split over the ranks; its weights are loaded unless a checkpoint will replace them.

    Raises:
        LomoError: the weights are missing or damaged, or memory runs out; the other ranks raise ``PeerError``.
    """
    torch.manual_seed(inputs.arguments.seed + dist.get_rank())
    free_host_bytes = min(gather_objects(free_bytes()[1]))  # before any rank allocates
    with start.preflight.explain_out_of_memory():
        return raise_on_all_ranks(lambda: _build_model(inputs, start, free_host_bytes))


def _build_model(inputs: Inputs, start: StartingPoint, free_host_bytes: int) -> PreTrainedModel:
    arguments = inputs.arguments
    model = _sharded_model(inputs, start, free_host_bytes)
    load_generation_config(model, str(start.checkpoint.folder / MODEL) if start.checkpoint else inputs.model_name)
    if arguments.pad_token or arguments.resize_embeddings:
        model.generation_config.pad_token_id = inputs.config.pad_token_id
    for token in reversed(inputs.datasets.end_tokens):
        add_stop_token(model, token)
    if arguments.tiled_logits or (arguments.tiled_logits is None and can_tile_logits(model)):
        tile_logits(model)
        logger.info("the loss is computed one tile of logits at a time; --tiled_logits false computes all at once")
    if arguments.gradient_checkpointing:
        recompute_activations(model, arguments.activation_offload)
    return model


def _sharded_model(inputs: Inputs, start: StartingPoint, free_host_bytes: int) -> PreTrainedModel:
    arguments = inputs.arguments
    dtype, trust = DTYPES[arguments.precision], arguments.trust_remote_code
    if start.checkpoint:
        return empty_model(inputs.config, start.ds_config, dtype, trust, free_host_bytes=free_host_bytes)
    verify_export(inputs.model_name, dist.get_rank(), dist.get_world_size())
    return load_model(
        inputs.model_name,
        inputs.config,
        start.ds_config,
        dtype,
        arguments.seed,
        trust,
        free_host_bytes,
        inputs.stored_rows,
        arguments.resize_embeddings or "mean",
    )


def build_engine(
    model: PreTrainedModel, inputs: Inputs, start: StartingPoint, add_files: Callable[[Path], None]
) -> tuple[TrainingEngine, RunCheckpoints]:
    """Build the engine, in the state of the checkpoint to resume from, and the manager of the run's checkpoints.

    Args:
        add_files: writes further files into a checkpoint's folder.
    """
    arguments, ds_config = inputs.arguments, start.ds_config
    scheduler = None if "scheduler" in ds_config else _scheduler(arguments, start.steps.total)
    with start.preflight.explain_out_of_memory():
        if arguments.is_baseline:
            baseline = initialize_baseline(model=model, config=ds_config, lr_scheduler=scheduler)
            return baseline, NoCheckpoints(arguments.optim)
        engine, *_ = initialize(model=model, config=ds_config, lr_scheduler=scheduler)
        if start.checkpoint:
            engine.restore(start.checkpoint)
        return engine, CheckpointManager(engine, arguments, start.progress, add_files)


def _scheduler(arguments: TrainArguments, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    warmup = warmup_steps(arguments, total_steps)
    name = "constant_with_warmup" if arguments.lr_scheduler_type == "constant" else arguments.lr_scheduler_type
    return lambda optimizer: get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
