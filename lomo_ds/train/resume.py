"""What may change between a checkpoint and the run that goes on from it: each argument, config field and the model.

``docs/resume.md`` has the rule as a table.
"""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import PretrainedConfig

from lomo_ds.checkpoint import MODEL, Checkpoint, list_checkpoints
from lomo_ds.config.arguments import TrainArguments
from lomo_ds.config.ds_config import shared_fields
from lomo_ds.errors import CheckpointError

logger = logging.getLogger(__name__)

Rule = Literal["changes", "stays", "moves", "apart"]
MEANINGS: dict[Rule, str] = {
    "changes": "takes effect from the first step",
    "stays": "refused",
    "moves": "accepted where it holds the same, else refused",
    "apart": "of this start alone, not compared",
}
RULES: dict[str, Rule] = {  # of the arguments; what is not here "changes"
    "model_name_or_path": "moves",
    "train_file": "moves",
    "tokenizer_name": "moves",
    "output_dir": "apart",
    "overwrite_output_dir": "apart",
    "resume_from_checkpoint": "apart",
    "local_rank": "apart",
    "pad_token": "stays",
    "new_special_tokens": "stays",
    "resize_embeddings": "stays",
    "max_seq_length": "stays",
    "rope_scaling": "stays",
    "seed": "stays",
    "optim": "stays",
    "bf16": "stays",
    "fp16": "stays",
    "weights": "stays",
}
NEWEST = ("latest", "last", "true", "yes", "1")  # Hugging Face's Trainer takes True for it
NOTHING = ("", "none", "false", "no", "0")
# of a model's config.json, what does not decide the function that is trained
NO_FUNCTION = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "bos_token_id", "eos_token_id", "id2label", "label2id",
}  # fmt: skip


def rule_of(argument: str) -> Rule:
    """What becomes of an argument that differs when a run is resumed."""
    return RULES.get(argument, "changes")


def resume_from(arguments: TrainArguments) -> Path | None:
    """The folder of a checkpoint, or of a run whose newest is meant; None to begin anew.

    Raises:
        CheckpointError: the run's own newest must be there, and ``output_dir`` holds none.
    """
    asked, output_dir = arguments.resume_from_checkpoint, Path(arguments.output_dir)
    word = "" if asked is None else asked.lower()
    if word in NOTHING:
        return None
    if word == "auto":
        return output_dir
    if word not in NEWEST:
        folder = Path(str(asked))
        return output_dir if folder.resolve() == output_dir.resolve() else folder
    if not list_checkpoints(output_dir):
        raise CheckpointError(
            f"--resume_from_checkpoint {asked} goes on from the newest checkpoint in --output_dir {output_dir}, which "
            "holds none; give the folder of one, or auto, which begins anew then"
        )
    return output_dir


def refuse_what_stays(found: Path, arguments: TrainArguments) -> None:
    """Check the arguments that must be those of the checkpoint in the folder ``found``.

    Raises:
        CheckpointError: some differ; each is named, with both values.
    """
    saved = _saved_arguments(found)
    differ = [
        f"--{name} {now} against {before} then" for name, (before, now) in _differences(saved, vars(arguments)).items()
        if rule_of(name) == "stays"
    ]  # fmt: skip
    if differ:
        raise CheckpointError(
            f"{found} was saved with other arguments, which a run keeps to its end: {'; '.join(differ)}; give those of "
            "then, or another --output_dir without --resume_from_checkpoint"
        )


def refuse_another_function(found: Path, config: PretrainedConfig) -> None:
    """Check that the checkpoint in the folder ``found`` is of a model that computes what ``config`` describes.

    Raises:
        CheckpointError: it is not; the fields that differ are named, with both values.
    """
    saved = _json(found / MODEL / "config.json")
    if not saved:
        return
    now, before = config.to_dict(), type(config).from_dict(saved).to_dict()
    if saved.get("model_type") != now.get("model_type"):  # each class of configuration writes its own
        before["model_type"] = saved.get("model_type")
    differ = [
        f"{name} {json.dumps(value, default=str)} against {json.dumps(before.get(name), default=str)} then"
        for name, value in now.items()
        if value != before.get(name) and name not in NO_FUNCTION and not name.endswith(("dropout", "pdrop"))
    ]
    if differ:
        raise CheckpointError(
            f"{found} is of a model with another config.json: {'; '.join(differ)}; resume with the model it was saved "
            "with, or give another --output_dir"
        )


def log_changes(found: Checkpoint, arguments: TrainArguments, ds_config: dict[str, Any]) -> None:
    """Say in a line which arguments and fields of the DeepSpeed config are no longer those of the checkpoint."""
    changed = {
        f"--{name}": pair for name, pair in _differences(_saved_arguments(found.folder), vars(arguments)).items()
        if rule_of(name) in ("changes", "moves")
    }  # fmt: skip
    before, now = _flat(_json(found.folder / "ds_config.json")), _flat(ds_config)
    if before:
        spoken_of = {*shared_fields(), "train_batch_size"}
        pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
        changed |= {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in spoken_of}
    if changed:
        logger.info("changed since %s was saved: %s", found.folder.name, _joined(changed))


def log_nothing_to_do(output_dir: Path, arguments: TrainArguments, steps: int) -> None:
    """Say that the run of ``steps`` steps has ended in ``output_dir``, and which arguments it had otherwise."""
    logger.info("nothing to do: the run of %d steps has ended, and its model is in %s", steps, output_dir)
    other = {
        f"--{name}": pair for name, pair in _differences(_saved_arguments(output_dir), vars(arguments)).items()
        if rule_of(name) != "apart"
    }  # fmt: skip
    if other:
        logger.warning(
            "that run had other arguments, and these have no effect: %s; to train with them, give another "
            "--output_dir, or --overwrite_output_dir without --resume_from_checkpoint",
            _joined(other),
        )


def _joined(changes: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {before} -> {now}" for name, (before, now) in changes.items())


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Both values of what is not as it was saved; an argument that was not known then is as its default."""
    default = {field.name: field.default for field in fields(TrainArguments)}
    if not saved:
        return {}
    pairs = {name: (saved.get(name, default[name]), value) for name, value in now.items()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _saved_arguments(folder: Path) -> dict[str, Any]:
    """The arguments that a checkpoint or run was saved with; none where launch/train.py's config.yaml is not there.

    In a run's own folder a person may have edited it into no YAML, or into another kind.
    """
    try:
        saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return saved if isinstance(saved, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _flat(section: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Fields of a config by their paths, ``optimizer.params.lr`` for example."""
    flat: dict[str, Any] = {}
    for name, value in section.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return flat


def table() -> str:
    """The rules as the table in ``docs/resume.md``."""
    return "\n".join(
        ["| argument | with another value |", "|---|---|"]
        + [f"| `--{field.name}` | {MEANINGS[rule_of(field.name)]} |" for field in fields(TrainArguments)]
    )
