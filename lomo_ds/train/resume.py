"""Rules for what may change on resume: each argument, each field of the DeepSpeed config, and the model.

``docs/resume.md`` contains the rules of the arguments as a table.
"""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

import yaml
from transformers import PretrainedConfig

from lomo_ds.checkpoint import MODEL, Checkpoint, list_checkpoints
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_config import shared_fields
from lomo_ds.config.parameter import base_type
from lomo_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

Rule = Literal["free", "fixed", "movable", "ignored"]
RULE_MEANINGS: dict[Rule, str] = {
    "free": "takes effect from the first step",
    "fixed": "refused",
    "movable": "accepted if the content is the same, otherwise refused",
    "ignored": "applies to this start only, not compared",
}
RULES: dict[str, Rule] = {  # by argument; all others are "free"
    "model_name_or_path": "movable",
    "train_file": "movable",
    "train_file_weights": "movable",
    "validation_split_percentage": "movable",
    "dataset_format": "movable",
    "dataset_text_field": "movable",
    "on_bad_rows": "movable",
    "completion_only_loss": "movable",
    "assistant_only_loss": "movable",
    "train_on_prompt": "movable",
    "packing": "movable",
    "packing_strategy": "movable",
    "chat_template_path": "movable",
    "eos_token": "movable",
    "tokenizer_name": "movable",
    "output_dir": "ignored",
    "overwrite_output_dir": "ignored",
    "resume_from_checkpoint": "ignored",
    "local_rank": "ignored",
    "pad_token": "fixed",
    "new_special_tokens": "fixed",
    "resize_embeddings": "fixed",
    "max_seq_length": "fixed",
    "rope_scaling": "fixed",
    "seed": "fixed",
    "optim": "fixed",
    "bf16": "fixed",
    "fp16": "fixed",
    "weights": "fixed",
}
NEWEST_WORDS = ("latest", "last", "true", "yes", "1")  # Hugging Face's Trainer accepts True
NONE_WORDS = ("", "none", "false", "no", "0")
# Fields of a model's config.json that do not change the function that the model computes
NON_FUNCTIONAL_FIELDS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id", "id2label", "label2id",
}  # fmt: skip


def resume_rule(argument: str) -> Rule:
    """Return the rule for an argument whose value has changed since the checkpoint was saved."""
    return RULES.get(argument, "free")


def requested_checkpoint(arguments: TrainArguments) -> Path | None:
    """Return the folder that --resume_from_checkpoint names: a checkpoint, or a run whose newest one is loaded.

    Returns:
        The folder; None to start at the first step.

    Raises:
        CheckpointError: a checkpoint in ``output_dir`` is required, and there is none.
    """
    requested, output_dir = arguments.resume_from_checkpoint, Path(arguments.output_dir)
    word = "" if requested is None else requested.lower()
    if word in NONE_WORDS:
        return None
    if word == "auto":
        return output_dir
    if word not in NEWEST_WORDS:
        folder = Path(str(requested))
        return output_dir if folder.resolve() == output_dir.resolve() else folder
    if not list_checkpoints(output_dir):
        raise CheckpointError(
            f"--resume_from_checkpoint {requested} resumes from the newest checkpoint in --output_dir {output_dir}, "
            "but there is none; give the folder of a checkpoint, or use auto to start from the beginning"
        )
    return output_dir


def check_fixed_arguments(folder: Path, arguments: TrainArguments) -> None:
    """Check that the fixed arguments have the values that the checkpoint in ``folder`` was saved with.

    Raises:
        CheckpointError: an argument differs; the message names each, with both values.
    """
    saved = _saved_arguments(folder)
    changes = [
        f"--{name} {now} (saved: {before})" for name, (before, now) in _differences(saved, vars(arguments)).items()
        if resume_rule(name) == "fixed"
    ]  # fmt: skip
    if changes:
        raise CheckpointError(
            f"{folder} was saved with other arguments, which must not change on resume: {'; '.join(changes)}; give the "
            "saved values, or another --output_dir without --resume_from_checkpoint"
        )


def changed_data_arguments(folder: Path, arguments: TrainArguments) -> str:
    """Return a list of the arguments that may move only with the data, and have changed since ``folder`` was saved."""
    differences = _differences(_saved_arguments(folder), vars(arguments))
    changes = {f"--{name}": pair for name, pair in differences.items() if resume_rule(name) == "movable"}
    return _format_changes(changes) if changes else "none of these arguments, but their files"


def check_same_model_function(folder: Path, config: PretrainedConfig) -> None:
    """Check that the model of the checkpoint in ``folder`` computes the same function as ``config`` describes.

    Raises:
        CheckpointError: a field differs; the message names each, with both values.
    """
    saved = _read_json(folder / MODEL / "config.json")
    if not saved:
        return
    now, before = config.to_dict(), type(config).from_dict(saved).to_dict()
    if saved.get("model_type") != now.get("model_type"):  # to_dict writes the model_type of the class
        before["model_type"] = saved.get("model_type")
    changes = [
        f"{name} {json.dumps(value, default=str)} (saved: {json.dumps(before.get(name), default=str)})"
        for name, value in now.items()
        if value != before.get(name) and name not in NON_FUNCTIONAL_FIELDS and not name.endswith(("dropout", "pdrop"))
    ]
    if changes:
        raise CheckpointError(
            f"{folder} was saved from a model with another config.json: {'; '.join(changes)}; resume with the same "
            "model, or give another --output_dir"
        )


def log_changes(checkpoint: Checkpoint, arguments: TrainArguments, ds_config: dict[str, Any]) -> None:
    """Log in one line the arguments and fields of the DeepSpeed config that differ from those of the checkpoint."""
    changed = {
        f"--{name}": pair for name, pair in _differences(_saved_arguments(checkpoint.folder), vars(arguments)).items()
        if resume_rule(name) in ("free", "movable")
    }  # fmt: skip
    before, now = _flatten(_read_json(checkpoint.folder / "ds_config.json")), _flatten(ds_config)
    if before:
        shared = {*shared_fields(), "train_batch_size"}
        pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
        changed |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in shared}
    if changed:
        logger.info("changed since %s was saved: %s", checkpoint.folder.name, _format_changes(changed))


def log_nothing_to_do(output_dir: Path, arguments: TrainArguments, steps: int) -> None:
    """Log that the run of ``steps`` steps in ``output_dir`` is finished, and warn of arguments that have changed."""
    logger.info("nothing to do: the run of %d steps is finished, and its model is in %s", steps, output_dir)
    changes = {
        f"--{name}": pair for name, pair in _differences(_saved_arguments(output_dir), vars(arguments)).items()
        if resume_rule(name) != "ignored"
    }  # fmt: skip
    if changes:
        logger.warning(
            "that run had other arguments, so these have no effect: %s; to train with them, give another "
            "--output_dir, or --overwrite_output_dir without --resume_from_checkpoint",
            _format_changes(changes),
        )


def _format_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of each argument that has changed; an argument that was not saved had its default."""
    default = {field.name: field.default for field in fields(TrainArguments)}
    if not saved:
        return {}
    pairs = {name: (saved.get(name, default[name]), value) for name, value in now.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _saved_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments that a checkpoint or run was saved with; empty if there is no readable config.yaml.

    A user may have edited the config.yaml of a run's folder into invalid YAML, or into something else than a mapping,
    and may have given one value where a list is expected.
    """
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(saved, dict):
        return {}
    hints = get_type_hints(TrainArguments)
    lists = [name for name in saved if name in hints and get_origin(base_type(hints[name])) is list]
    return saved | {name: [saved[name]] for name in lists if isinstance(saved[name], str | float | int)}


def _read_json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _flatten(section: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the fields of a config by path, ``optimizer.params.lr`` for example."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flatten(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat


def rules_table() -> str:
    """Return the rules as the table in ``docs/resume.md``."""
    return "\n".join(
        ["| argument | with another value |", "|---|---|"]
        + [f"| `--{field.name}` | {RULE_MEANINGS[resume_rule(field.name)]} |" for field in fields(TrainArguments)]
    )
