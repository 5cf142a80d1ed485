"""A training job in phases: join, read and check, build, loop, finish. All ranks agree on errors at the end of each."""

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lomo_ds.checkpoint import MODEL, remove
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.distributed.device import compute_device
from lomo_ds.errors import ConfigError
from lomo_ds.models import save_settings
from lomo_ds.numerics.precision import common_precision, fast_precision, is_fast
from lomo_ds.train.assembly import build_engine, build_model
from lomo_ds.train.inputs import Inputs, read_inputs
from lomo_ds.train.loop import Trainer
from lomo_ds.train.metrics import Monitor
from lomo_ds.train.progress import FINISHED, is_finished
from lomo_ds.train.resume import log_nothing_to_do
from lomo_ds.train.signals import StopRequest
from lomo_ds.train.starting_point import StartingPoint, all_steps, find_starting_point
from lomo_ds.train.trackers import check_trackers

logger = logging.getLogger(__name__)


def train(arguments: TrainArguments, explicit: frozenset[str], stop: StopRequest) -> None:
    """Start or resume a training job on all ranks; the process group must have been started.

    Args:
        explicit: names of the arguments that the user set, rather than left at their default.
        stop: a request to end the job after the current step.

    Raises:
        LomoError: on the rank that reports a user error; the others raise ``PeerError``.
    """
    raise_on_all_ranks(lambda: check_trackers(arguments.trackers) if dist.get_rank() == 0 else None)
    fast = common_precision(gather_objects(fast_precision(compute_device().type)))  # join
    with ExitStack() as lock:
        inputs = read_inputs(arguments, explicit, fast, lock)  # read and check
        _warn_of_emulation(inputs.arguments)
        if not _is_already_finished(inputs):
            start = find_starting_point(inputs)
            _train_from(start, inputs, stop)


def _train_from(start: StartingPoint, inputs: Inputs, stop: StopRequest) -> None:
    """Build the model and engine, train, and export."""
    model = build_model(inputs, start)

    def add_files(folder: Path) -> None:
        """Write the settings that a checkpoint needs to be exported, or read by a person, on its own."""
        _write_settings(folder, inputs.arguments, start.ds_config)
        (folder / MODEL).mkdir()
        save_settings(model, inputs.tokenizer, folder / MODEL)

    engine, checkpoints = build_engine(model, inputs, start, add_files)
    with (
        raise_on_all_ranks(lambda: _start_records(start, inputs)) as monitor,
        start.preflight.explain_out_of_memory(),
    ):
        Trainer(
            inputs.arguments,
            engine,
            inputs.tokenizer,
            start.steps,
            inputs.datasets,
            monitor,
            start.progress,
            stop,
            checkpoints,
            _run_id(inputs),
        ).run()
    engine.destroy()


def _warn_of_emulation(arguments: TrainArguments) -> None:
    """Warn, and name the faster setting, if half precision is requested and the processor emulates it."""
    if not is_fast(arguments.precision, compute_device().type):
        logger.warning(
            "%s was requested, but this processor has no %s instructions and emulates them, several times slower than "
            "fp32; use --deepspeed zero3_auto (ds_configs/zero3_auto.json), which takes fp32 here",
            arguments.precision, arguments.precision,
        )  # fmt: skip


def _run_id(inputs: Inputs) -> dict[str, Any]:
    """Return the fields that identify the run in the file that marks it as finished."""
    steps, arguments = all_steps(inputs), inputs.arguments
    return {
        "steps": steps.total, "model": arguments.model_name_or_path, "data": steps.data, "optim": arguments.optim,
    }  # fmt: skip


def _is_already_finished(inputs: Inputs) -> bool:
    """Return whether the run is finished; a scheduler may start a job again after its last step."""
    if inputs.arguments.resume_from_checkpoint != "auto":
        return False
    run_id = _run_id(inputs)
    ended = gather_objects(is_finished(inputs.output_dir, run_id))[0]
    if ended and dist.get_rank() == 0:
        log_nothing_to_do(inputs.output_dir, inputs.arguments, run_id["steps"])
    return ended


def _start_records(start: StartingPoint, inputs: Inputs) -> Monitor:
    """Write the run's settings, delete checkpoints of another run, and open the metrics."""
    output_dir, rank = inputs.output_dir, dist.get_rank()
    if rank == 0:
        (output_dir / FINISHED).unlink(missing_ok=True)
        for folder in start.obsolete:
            logger.info("deleting %s of another run, because of --overwrite_output_dir", folder)
            remove(folder)
        _write_settings(output_dir, inputs.arguments, start.ds_config)
    try:
        return Monitor(output_dir, rank, start.steps.step, inputs.arguments.trackers, asdict(inputs.arguments))
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from None


def _write_settings(folder: Path, arguments: TrainArguments, ds_config: dict[str, Any]) -> None:
    """Write the run's resolved arguments and DeepSpeed config."""
    try:
        arguments.dump(folder / "config.yaml")
        (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None
