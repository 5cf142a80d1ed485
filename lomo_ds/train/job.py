"""A training job from its arguments: everything is read, checked and joined before the first step."""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from lomo_ds import zero3
from lomo_ds.checkpoint import (
    MODEL,
    Checkpoint,
    describe_tensors,
    is_run_folder,
    open_checkpoint,
    open_newest,
    remove,
    remove_unfinished,
)
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_config import complete_config, resolve_config, warmup_steps
from lomo_ds.data import (
    PackedBlocks,
    TrainingSteps,
    check_prompt,
    check_token_ids,
    highest_id,
    tokenize_file,
    warn_about_unknown_tokens,
)
from lomo_ds.distributed.collectives import gather_objects, raise_on_all_ranks
from lomo_ds.distributed.process_group import is_local_main_process
from lomo_ds.engine.baseline import initialize_baseline
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.engine.lomo import initialize
from lomo_ds.engine.protocol import TrainingEngine
from lomo_ds.errors import CheckpointError, ConfigError, DataError
from lomo_ds.memory.budget import free_bytes
from lomo_ds.models import (
    add_special_tokens,
    can_tile_logits,
    empty_model,
    find_model,
    load_config,
    load_generation_config,
    load_model,
    load_tokenizer,
    meta_model,
    recompute_activations,
    save_settings,
    saved_tensors,
    scale_rope,
    sequence_length,
    set_vocab_size,
    tile_logits,
    verify_export,
)
from lomo_ds.numerics.precision import DTYPES, FastPrecision, common_precision, fast_precision, is_fast
from lomo_ds.train.checkpoint_manager import CheckpointKeeper, Keeper, NoCheckpoints
from lomo_ds.train.loop import Trainer
from lomo_ds.train.metrics import Monitor
from lomo_ds.train.output_folder import (
    alone_in,
    checkpoints_of_another_run,
    refuse_another_run,
    refuse_input_files,
    refuse_what_is_read,
    refuse_what_others_wrote,
)
from lomo_ds.train.preflight import Outlook
from lomo_ds.train.progress import FINISHED, Progress, is_finished
from lomo_ds.train.resume import log_changes, log_nothing_to_do, refuse_another_function, refuse_what_stays, resume_from
from lomo_ds.train.signals import StopRequest

logger = logging.getLogger(__name__)


def train(arguments: TrainArguments, given: frozenset[str], stop: StopRequest) -> None:
    """Fine-tune as ``arguments`` say, or go on with it; the process group must have been started.

    Args:
        given: the arguments that were given, as opposed to left at their default.
        stop: asks for the step under way to be the last one of this process.

    Raises:
        LomoError: in the user's words, on the rank that knows; the others raise ``PeerError``.
    """
    world_size = dist.get_world_size()
    fast = common_precision(gather_objects(fast_precision(_device_type())))
    ds_config, arguments = raise_on_all_ranks(lambda: _read_configs(arguments, given, world_size, fast))
    _warn_of_emulation(arguments)
    output_dir = Path(arguments.output_dir)
    name = _find_model(arguments)
    raise_on_all_ranks(lambda: _claim_folder(output_dir, name, arguments))
    with raise_on_all_ranks(lambda: _alone(output_dir)):
        _train_in(output_dir, name, ds_config, arguments, stop)


def _train_in(
    output_dir: Path, name: str, ds_config: dict[str, Any], arguments: TrainArguments, stop: StopRequest
) -> None:
    """Train in a folder that may be written, the model whose folder is ``name``."""
    rank = dist.get_rank()
    config, tokenizer, length, stored_rows = raise_on_all_ranks(lambda: _load_vocabulary(name, arguments))
    arguments = dataclasses.replace(arguments, max_seq_length=length)
    training, validation = _load_blocks(arguments, tokenizer, length, config.vocab_size)
    anew = _steps(arguments, training, Progress())
    run_id = {"steps": anew.total, "model": arguments.model_name_or_path, "data": anew.data, "optim": arguments.optim}
    if arguments.resume_from_checkpoint == "auto" and _is_done(output_dir, run_id, arguments):
        return
    found = _find_checkpoint(arguments, config, anew.data)
    others = raise_on_all_ranks(lambda: _others(arguments, found))
    raise_on_all_ranks(lambda: refuse_another_run(arguments, found.folder if found else None, others))
    progress = _progress(found, arguments, validation)
    steps = _steps(arguments, training, progress)
    raise_on_all_ranks(lambda: _refuse_fewer_steps(steps, arguments))
    filled = raise_on_all_ranks(lambda: _filled(_as_saved(ds_config, found), arguments, steps.total, config))
    outlook = Outlook(config, filled, arguments, length)
    raise_on_all_ranks(outlook.say)
    if found and rank == 0:
        log_changes(found, arguments, filled)

    torch.manual_seed(arguments.seed + rank)
    free_host = min(gather_objects(free_bytes()[1]))  # before any rank takes of it
    with outlook.advising():
        model = raise_on_all_ranks(
            lambda: _empty_or_loaded(found, name, config, stored_rows, filled, arguments, free_host)
        )
    raise_on_all_ranks(lambda: load_generation_config(model, str(found.folder / MODEL) if found else name))
    if arguments.pad_token or arguments.resize_embeddings:
        model.generation_config.pad_token_id = config.pad_token_id
    raise_on_all_ranks(lambda: _tile_logits(model, arguments.tiled_logits))
    if arguments.gradient_checkpointing:
        raise_on_all_ranks(lambda: recompute_activations(model, arguments.activation_offload))
    scheduler = None if "scheduler" in filled else _scheduler(arguments, steps.total)

    def add_files(folder: Path) -> None:
        """What a checkpoint needs to be exported, and to be understood, without the rest of the run."""
        _write_settings(folder, arguments, filled)
        (folder / MODEL).mkdir()
        save_settings(model, tokenizer, folder / MODEL)

    with outlook.advising():
        engine, keeper = _engine_and_keeper(model, filled, scheduler, found, arguments, progress, add_files)
    raise_on_all_ranks(lambda: _begin(arguments, filled, others) if rank == 0 else None)
    with raise_on_all_ranks(lambda: _open_monitor(output_dir, rank, steps.step)) as monitor, outlook.advising():
        Trainer(arguments, engine, tokenizer, steps, validation, monitor, progress, stop, keeper, run_id).run()
    engine.destroy()


def _read_configs(
    arguments: TrainArguments, given: frozenset[str], world_size: int, fast: FastPrecision
) -> tuple[dict[str, Any], TrainArguments]:
    ds_config, arguments, from_hardware = resolve_config(arguments, given, world_size, fast.precision)
    if from_hardware:
        logger.info("precision auto: %s, for %s", arguments.precision, fast.reason)
    return ds_config, arguments


def _warn_of_emulation(arguments: TrainArguments) -> None:
    """Name the faster setting where half precision was asked for that the processor has no instructions for."""
    if not is_fast(arguments.precision, _device_type()):
        logger.warning(
            "%s was asked for, but this processor has no %s instructions and emulates them, several times slower than "
            "fp32; use --deepspeed zero3_auto (ds_configs/zero3_auto.json), which takes fp32 here",
            arguments.precision, arguments.precision,
        )  # fmt: skip


def _device_type() -> str:
    return torch.device(get_accelerator().device_name()).type


def _steps(arguments: TrainArguments, blocks: PackedBlocks, progress: Progress) -> TrainingSteps:
    """What is left of the run's steps after ``progress``."""
    return TrainingSteps(
        blocks,
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


def _progress(found: Checkpoint | None, arguments: TrainArguments, validation: PackedBlocks | None) -> Progress:
    """How far the run has come in ``found``."""
    held_out = None if validation is None else validation.digest()
    if found is None:
        return Progress(held_out=held_out, prompt=arguments.sample_prompt)
    in_place = found.folder.resolve().parent == Path(arguments.output_dir).resolve()
    return Progress.resumed(found.record["client_state"]["progress"], held_out, arguments.sample_prompt, in_place)


def _refuse_fewer_steps(steps: TrainingSteps, arguments: TrainArguments) -> None:
    if steps.step > steps.total:
        raise CheckpointError(
            f"the checkpoint to resume from is {steps.step} steps old, and the run is to have {steps.total}; give at "
            f"least --max_steps {steps.step}, or resume from an older one"
        )
    if arguments.max_steps <= 0 and steps.is_past_end:
        raise CheckpointError(
            f"the checkpoint to resume from has seen the text {steps.epochs:g} times, and the run is to see it "
            f"{arguments.num_train_epochs:g} times; give a larger --num_train_epochs, or resume from an older one"
        )


def _as_saved(ds_config: dict[str, Any], found: Checkpoint | None) -> dict[str, Any]:
    """``ds_config`` in which ``auto`` is what it came to then: another schedule is as exact, but rounds otherwise."""
    if found is None or found.record["world_size"] != dist.get_world_size():
        return ds_config
    config = copy.deepcopy(ds_config)
    params = config["optimizer"].setdefault("params", {})
    for name, value in found.record["schedule"].items():
        if params.get(name, "auto") == "auto":
            params[name] = value
    return config


def _is_done(output_dir: Path, run_id: dict[str, Any], arguments: TrainArguments) -> bool:
    """Whether this very run has ended before: a scheduler may start a job once more than there is work."""
    done = gather_objects(is_finished(output_dir, run_id))[0]
    if done and dist.get_rank() == 0:
        log_nothing_to_do(output_dir, arguments, run_id["steps"])
    return done


def _find_checkpoint(arguments: TrainArguments, config: PretrainedConfig, data: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint to go on from, verified; None to start from the beginning."""
    output_dir = Path(arguments.output_dir)
    tensors = raise_on_all_ranks(lambda: describe_tensors(_kept_tensors(config, arguments)))

    def check(folder: Path, record: dict[str, Any]) -> None:
        refuse_what_stays(folder, arguments)
        refuse_another_function(folder, config)
        theirs = record["client_state"].get("data")
        if theirs != data:
            raise CheckpointError(
                f"{folder} was saved while training on {theirs}, and --train_file, --max_seq_length and --seed give "
                f"{data}; resume with the same text, length and seed, or give another --output_dir"
            )

    raise_on_all_ranks(lambda: remove_unfinished(output_dir) if dist.get_rank() == 0 else None)
    folder = raise_on_all_ranks(lambda: resume_from(arguments))
    if folder is None:
        return None
    if folder == output_dir or raise_on_all_ranks(lambda: is_run_folder(folder)):
        found = open_newest(folder, tensors, check=check)
    else:
        found = open_checkpoint(folder, tensors, check=check)
    if found and found.folder.resolve().parent != output_dir.resolve():
        raise_on_all_ranks(lambda: refuse_what_is_read(output_dir, [found.folder]))
    return found


def _kept_tensors(config: PretrainedConfig, arguments: TrainArguments) -> dict[str, Tensor]:
    """What a checkpoint of this run holds of the model, on the meta device."""
    model = meta_model(config, DTYPES[arguments.precision], arguments.trust_remote_code)
    whole = saved_tensors(model)
    if arguments.weights != "int8":
        return whole
    return zero3.stored_tensors(whole, zero3.quantized_names(model), dist.get_world_size())


def _open_monitor(output_dir: Path, rank: int, step: int) -> Monitor:
    try:
        return Monitor(output_dir, rank, step)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from None


def _empty_or_loaded(
    found: Checkpoint | None,
    name: str,
    config: PretrainedConfig,
    stored_rows: int,
    ds_config: dict[str, Any],
    arguments: TrainArguments,
    free_host_bytes: int,
) -> PreTrainedModel:
    """The model, split over the ranks; without its weights, if a checkpoint has others."""
    dtype, trust = DTYPES[arguments.precision], arguments.trust_remote_code
    if found:
        return empty_model(config, ds_config, dtype, trust, free_host_bytes=free_host_bytes)
    verify_export(name, dist.get_rank(), dist.get_world_size())
    new_rows = arguments.resize_embeddings or "mean"
    return load_model(name, config, ds_config, dtype, arguments.seed, trust, free_host_bytes, stored_rows, new_rows)


def _tile_logits(model: PreTrainedModel, asked: bool | None) -> None:
    """Spare the memory of a batch's logits, where that was asked for, or nothing was and the model allows it."""
    if asked or (asked is None and can_tile_logits(model)):
        tile_logits(model)
        logger.info("the loss is computed a tile of logits at a time; --tiled_logits false computes them whole")


def _filled(
    ds_config: dict[str, Any], arguments: TrainArguments, total_steps: int, config: PretrainedConfig
) -> dict[str, Any]:
    """``ds_config`` with nothing left to fill in, or refused before a model is loaded for nothing."""
    ds_config = complete_config(ds_config, arguments, total_steps, config, dist.get_world_size())
    parse_ds_config(ds_config)
    return ds_config


def _engine_and_keeper(
    model: PreTrainedModel,
    ds_config: dict[str, Any],
    scheduler: Callable[[torch.optim.Optimizer], Any] | None,
    found: Checkpoint | None,
    arguments: TrainArguments,
    progress: Progress,
    add_files: Callable[[Path], None],
) -> tuple[TrainingEngine, Keeper]:
    """What trains the model, ``found`` put back into it; and what keeps its checkpoints."""
    if arguments.optim != "lomo":
        baseline = initialize_baseline(model=model, config=ds_config, lr_scheduler=scheduler)
        return baseline, NoCheckpoints(arguments.optim)
    engine, *_ = initialize(model=model, config=ds_config, lr_scheduler=scheduler)
    if found:
        engine.restore(found)
    return engine, CheckpointKeeper(engine, arguments, progress, add_files)


def _claim_folder(output_dir: Path, model: str, arguments: TrainArguments) -> None:
    """Make the folder to write into, if nothing good is there that would be lost."""
    refuse_what_is_read(output_dir, [model, *([arguments.tokenizer_name] if arguments.tokenizer_name else [])])
    refuse_what_others_wrote(output_dir)
    refuse_input_files(arguments)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {output_dir} cannot be made: {error.strerror}") from None


def _alone(output_dir: Path) -> ExitStack:
    """Hold the folder against other jobs, on the rank that writes there first, until the stack is left."""
    with ExitStack() as stack:
        if dist.get_rank() == 0:
            stack.enter_context(alone_in(output_dir))
        return stack.pop_all()


def _others(arguments: TrainArguments, found: Checkpoint | None) -> list[Path]:
    """The checkpoints of another run in the output folder; of this run, newer ones were passed over as damaged."""
    if resume_from(arguments) == Path(arguments.output_dir):
        return []
    return checkpoints_of_another_run(Path(arguments.output_dir), found.folder if found else None)


def _begin(arguments: TrainArguments, ds_config: dict[str, Any], others: list[Path]) -> None:
    """Say in the output folder what runs there now, and delete the checkpoints of another run."""
    output_dir = Path(arguments.output_dir)
    (output_dir / FINISHED).unlink(missing_ok=True)
    for folder in others:
        logger.info("%s of another run is deleted, as --overwrite_output_dir asks", folder)
        remove(folder)
    _write_settings(output_dir, arguments, ds_config)


def _write_settings(folder: Path, arguments: TrainArguments, ds_config: dict[str, Any]) -> None:
    """The run's arguments and DeepSpeed config as resolved."""
    try:
        arguments.dump(folder / "config.yaml")
        (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from None


def _find_model(arguments: TrainArguments) -> str:
    """The folder of the model, or a preset's name; what has to be downloaded is, once on each host."""
    name = arguments.model_name_or_path
    trust = arguments.trust_remote_code
    raise_on_all_ranks(lambda: find_model(name, True, trust) if is_local_main_process() else None)
    found = raise_on_all_ranks(lambda: find_model(name, False, trust))
    raise_on_all_ranks(lambda: verify_export(found, dist.get_rank(), dist.get_world_size(), weights=False))
    return found


def _load_vocabulary(
    name: str, arguments: TrainArguments
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, int, int]:
    """The model's configuration, the tokenizer, a sequence length that both allow, and the rows of stored embeddings.

    The configuration is that of the model to be trained, whose embeddings may have more rows than are stored.
    """
    config = load_config(name, arguments.trust_remote_code)
    if arguments.rope_scaling is not None:
        scale_rope(config, arguments.rope_scaling, arguments.max_seq_length)
    tokenizer = load_tokenizer(arguments.tokenizer_name or name, arguments.trust_remote_code)
    add_special_tokens(tokenizer, arguments.pad_token, arguments.special_tokens)
    stored_rows = config.vocab_size
    if arguments.resize_embeddings and highest_id(tokenizer) >= stored_rows:
        set_vocab_size(config, highest_id(tokenizer) + 1)
        logger.info(
            "the embeddings have %d rows, and are given %d for the tokenizer's tokens", stored_rows, config.vocab_size
        )
    if _has_new_padding(tokenizer, arguments, stored_rows, config.vocab_size):
        config.pad_token_id = tokenizer.pad_token_id
    if (highest := highest_id(tokenizer)) >= config.vocab_size:
        logger.info(
            "the tokenizer has tokens up to number %d, and the model's embedding rows up to %d; a text with a token "
            "beyond them will be refused", highest, config.vocab_size - 1,
        )  # fmt: skip
    if arguments.sample_prompt is not None:
        check_prompt(arguments.sample_prompt, tokenizer, config.vocab_size)
    return config, tokenizer, sequence_length(config, arguments.max_seq_length), stored_rows


def _has_new_padding(
    tokenizer: PreTrainedTokenizerBase, arguments: TrainArguments, stored_rows: int, rows: int
) -> bool:
    """Whether the padding token was asked for, or had no row before; and has one now."""
    pad = tokenizer.pad_token_id
    return pad is not None and pad < rows and (arguments.pad_token is not None or pad >= stored_rows)


def _load_blocks(
    arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase, length: int, rows: int
) -> tuple[PackedBlocks, PackedBlocks | None]:
    """Training and validation text in blocks of ``length`` tokens, for a model whose embedding has ``rows`` rows."""
    files = [Path(file) for file in (arguments.train_file, arguments.validation_file) if file]
    cache = Path(arguments.output_dir) / "cache"

    def tokenized() -> list[PackedBlocks]:
        return [_packed(file, tokenizer, cache, rows, length) for file in files]

    # one rank of each host tokenizes, the others map its files
    raise_on_all_ranks(lambda: tokenized() if is_local_main_process() else None)
    training, *validation = raise_on_all_ranks(tokenized)
    for file, blocks in zip(files, [training, *validation], strict=True):
        warn_about_unknown_tokens(blocks.tokens, file, tokenizer)
    return training, validation[0] if validation else None


def _packed(file: Path, tokenizer: PreTrainedTokenizerBase, cache: Path, rows: int, length: int) -> PackedBlocks:
    tokens = tokenize_file(file, tokenizer, cache)
    if len(tokens) < 2:
        raise DataError(f"{file} gives {len(tokens)} token; there is nothing to predict in fewer than 2")
    check_token_ids(tokens, file, tokenizer, rows)
    return PackedBlocks(tokens, length)


def _scheduler(arguments: TrainArguments, total_steps: int) -> Callable[[torch.optim.Optimizer], Any]:
    warmup = warmup_steps(arguments, total_steps)
    name = "constant_with_warmup" if arguments.lr_scheduler_type == "constant" else arguments.lr_scheduler_type
    return lambda optimizer: get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
