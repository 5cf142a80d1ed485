"""Starting point of a training job: the first step or a checkpoint, checked against the arguments."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lomo_ds import zero3
from lomo_ds.checkpoint import (
    Checkpoint,
    describe_tensors,
    is_run_folder,
    open_checkpoint,
    open_newest,
    remove_unfinished,
)
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_config import finalize_config
from lomo_ds.data import TrainingSteps
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.errors import CheckpointError
from lomo_ds.models import meta_model, saved_tensors
from lomo_ds.numerics.precision import DTYPES
from lomo_ds.train.inputs import Inputs
from lomo_ds.train.output_folder import check_input_overlap, check_other_run, checkpoints_of_other_run
from lomo_ds.train.preflight import MemoryPreflight
from lomo_ds.train.progress import Progress
from lomo_ds.train.resume import (
    changed_data_arguments,
    check_fixed_arguments,
    check_same_model_function,
    log_changes,
    requested_checkpoint,
)

# The choices that need least memory
LEANER = {"accumulation": "stash", "gather_granularity": "module"}


@dataclass(frozen=True)
class StartingPoint:
    """State that a training job starts from, with all settings resolved.

    Attributes:
        checkpoint: the verified checkpoint; None to start at the first step.
        obsolete: checkpoints of another run, to be deleted when training begins.
        ds_config: complete, without ``auto``.
    """

    checkpoint: Checkpoint | None
    obsolete: list[Path]
    progress: Progress
    steps: TrainingSteps
    ds_config: dict[str, Any]
    preflight: MemoryPreflight


def all_steps(inputs: Inputs) -> TrainingSteps:
    """Return all steps of the run."""
    return _steps(inputs, Progress())


def find_starting_point(inputs: Inputs) -> StartingPoint:
    """Find and verify the checkpoint to resume from, if any, and check that the run can continue from it.

    Raises:
        LomoError: the checkpoint is missing or damaged, or the arguments contradict it or the output folder; the other
            ranks raise ``PeerError``.
    """
    folder, is_run, tensors = raise_on_all_ranks(lambda: _find_checkpoint_folder(inputs))
    checkpoint = None
    if folder is not None:
        open_function = open_newest if is_run else open_checkpoint
        checkpoint = open_function(folder, tensors, check=lambda path, record: _check_same_run(inputs, path, record))
    start = raise_on_all_ranks(lambda: _start_at(checkpoint, inputs))
    _use_leaner_choices(start)
    return start


def _use_leaner_choices(start: StartingPoint) -> None:
    """Accumulate in the stash, or gather by module, if the plan says so, since the alternative would not fit."""
    params = (start.ds_config.get("optimizer") or {}).get("params") or {}
    chosen = gather_objects(start.preflight.chosen)[0]
    for name, leaner in LEANER.items():
        if chosen.get(name) == leaner and params.get(name) == "auto":
            params[name] = leaner


def _find_checkpoint_folder(inputs: Inputs) -> tuple[Path | None, bool, dict[str, list[Any]]]:
    """Return the folder to resume from, whether it is a run rather than a checkpoint, and the tensors it must hold."""
    tensors = describe_tensors(_stored_tensors(inputs))
    if dist.get_rank() == 0:
        remove_unfinished(inputs.output_dir)
    folder = requested_checkpoint(inputs.arguments)
    is_run = folder is not None and (folder == inputs.output_dir or is_run_folder(folder))
    return folder, is_run, tensors


def _stored_tensors(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors of the model that a checkpoint of this run holds, on the meta device."""
    arguments = inputs.arguments
    model = meta_model(inputs.config, DTYPES[arguments.precision], arguments.trust_remote_code)
    tensors = saved_tensors(model)
    if arguments.weights != "int8":
        return tensors
    return zero3.stored_tensors(tensors, zero3.quantized_names(model), dist.get_world_size())


def _check_same_run(inputs: Inputs, folder: Path, record: dict[str, Any]) -> None:
    """Raise if the checkpoint was saved with other fixed arguments, another model or another text."""
    check_fixed_arguments(folder, inputs.arguments)
    check_same_model_function(folder, inputs.config)
    saved, data = record["client_state"].get("data"), all_steps(inputs).data
    if saved != data:
        raise CheckpointError(
            f"{folder} was saved while training on other data ({saved}) than --train_file and the other arguments of "
            f"the data give ({data}); changed: {changed_data_arguments(folder, inputs.arguments)}; resume with the "
            "same ones, or give another --output_dir"
        )


def _start_at(checkpoint: Checkpoint | None, inputs: Inputs) -> StartingPoint:
    arguments, output_dir = inputs.arguments, inputs.output_dir
    folder = checkpoint.folder if checkpoint else None
    if folder is not None and folder.resolve().parent != output_dir.resolve():
        check_input_overlap(output_dir, [folder])
    # When resuming in place, checkpoints newer than the opened one are damaged, not another run's.
    in_place = requested_checkpoint(arguments) == output_dir
    obsolete = [] if in_place else checkpoints_of_other_run(output_dir, folder)
    check_other_run(arguments, folder, obsolete)
    progress = _progress(checkpoint, inputs)
    steps = _steps(inputs, progress)
    _check_steps_left(steps, arguments)
    ds_config = finalize_config(
        _with_saved_choices(inputs.ds_config, checkpoint), arguments, steps.total, inputs.config, dist.get_world_size()
    )
    parse_ds_config(ds_config)
    preflight = MemoryPreflight(inputs.config, ds_config, arguments, inputs.datasets.training.has_documents)
    preflight.log()
    if checkpoint and dist.get_rank() == 0:
        log_changes(checkpoint, arguments, ds_config)
    return StartingPoint(checkpoint, obsolete, progress, steps, ds_config, preflight)


def _progress(checkpoint: Checkpoint | None, inputs: Inputs) -> Progress:
    """Return the progress of the run in ``checkpoint``."""
    held_out = None if inputs.datasets.validation is None else inputs.datasets.validation.digest()
    prompt = inputs.arguments.sample_prompt
    if checkpoint is None:
        return Progress(held_out=held_out, prompt=prompt)
    in_place = checkpoint.folder.resolve().parent == inputs.output_dir.resolve()
    return Progress.restored(checkpoint.record["client_state"]["progress"], held_out, prompt, in_place)


def _steps(inputs: Inputs, progress: Progress) -> TrainingSteps:
    """Return the remaining steps of the run after ``progress``."""
    arguments = inputs.arguments
    return TrainingSteps(
        inputs.datasets.training,
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        dist.get_rank(),
        dist.get_world_size(),
        arguments.seed,
        arguments.num_train_epochs,
        arguments.max_steps,
        progress.position,
        progress.step,
    )


def _check_steps_left(steps: TrainingSteps, arguments: TrainArguments) -> None:
    if steps.step > steps.total:
        raise CheckpointError(
            f"the checkpoint to resume from was saved after step {steps.step}, but the run has {steps.total} steps; "
            f"give at least --max_steps {steps.step}, or resume from an older checkpoint"
        )
    if arguments.max_steps <= 0 and steps.is_past_end:
        raise CheckpointError(
            f"the checkpoint to resume from has trained for {steps.epochs:g} epochs, but the run has "
            f"{arguments.num_train_epochs:g}; give a larger --num_train_epochs, or resume from an older checkpoint"
        )


def _with_saved_choices(ds_config: dict[str, Any], checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Replace ``auto`` by the values chosen in the checkpoint, since another schedule rounds differently.

    They depend on each other, so none of them holds if this run accumulates or gathers in another way.
    """
    if checkpoint is None or checkpoint.record["world_size"] != dist.get_world_size():
        return ds_config
    config, chosen = copy.deepcopy(ds_config), checkpoint.record["schedule"]
    params = config["optimizer"].setdefault("params", {})
    asked = {name: params.get(name, "auto") for name in ("accumulation", "gather_granularity")}
    before = {"accumulation": "stash"} | chosen  # older checkpoints do not name it
    if any("auto" not in (value, before[name]) and value != before[name] for name, value in asked.items()):
        return ds_config
    for name, value in chosen.items():
        if params.get(name, "auto") == "auto":
            params[name] = value
    return config
