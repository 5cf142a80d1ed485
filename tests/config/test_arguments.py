"""Arguments from YAML and the command line."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from lomo_ds.config.arguments import help_text, parse_arguments
from lomo_ds.errors import ConfigError

REQUIRED = ["--model_name_or_path", "m", "--train_file", "t.txt", "--output_dir", "o"]


def yaml_file(folder: Path, text: str) -> str:
    (folder / "run.yaml").write_text(text)
    return str(folder / "run.yaml")


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = yaml_file(tmp_path, "learning_rate: 1e-2\nmax_steps: 7\nbf16: true\nvalidation_file: null\n")
    arguments, explicit = parse_arguments(["--config", config, *REQUIRED, "--max_steps=9"])
    assert (arguments.learning_rate, arguments.max_steps, arguments.bf16) == (0.01, 9, True)
    assert (arguments.seed, arguments.validation_file) == (42, None)
    assert explicit == {"learning_rate", "max_steps", "bf16", "model_name_or_path", "train_file", "output_dir"}


@pytest.mark.parametrize(
    ("optim", "learning_rate", "max_grad_norm"),
    [("lomo", 0.03, 1.0), ("adalomo", 5e-4, 0.0), ("adamw", 5e-5, 1.0), ("sgd", 0.03, 1.0)],
)
def test_each_optimizer_has_its_own_learning_rate_and_clip(
    tmp_path: Path, optim: str, learning_rate: float, max_grad_norm: float
) -> None:
    arguments, explicit = parse_arguments([*REQUIRED, "--optim", optim])
    assert (arguments.learning_rate, arguments.max_grad_norm) == (learning_rate, max_grad_norm)
    assert not {"learning_rate", "max_grad_norm"} & explicit
    arguments.dump(tmp_path / "config.yaml")
    dumped = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (dumped["learning_rate"], dumped["max_grad_norm"]) == (learning_rate, max_grad_norm)
    given, _ = parse_arguments([*REQUIRED, "--optim", optim, "--learning_rate", "1", "--max_grad_norm", "2"])
    assert (given.learning_rate, given.max_grad_norm) == (1, 2)


def test_a_dumped_config_gives_the_same_arguments(tmp_path: Path) -> None:
    """All but --overwrite_output_dir, which applies to one start only."""
    arguments, _ = parse_arguments([*REQUIRED, "--gradient_checkpointing", "--lr_scheduler_type", "cosine"])
    dataclasses.replace(arguments, overwrite_output_dir=True).dump(tmp_path / "config.yaml")
    assert parse_arguments(["--config", str(tmp_path / "config.yaml")])[0] == arguments


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*REQUIRED, "--learning_rat", "1"], "unknown argument --learning_rat; did you mean '--learning_rate'"),
        ([*REQUIRED, "--qqq=1"], "unknown argument --qqq; --help lists all"),
        (REQUIRED[2:], "--model_name_or_path must be given"),
        ([*REQUIRED, "--max_steps", "many"], "argument --max_steps.*: invalid int value: 'many'"),
        ([*REQUIRED, "--lr_scheduler_type", "step"], "invalid choice: 'step'"),
        ([*REQUIRED, "--bf16", "--fp16"], "bf16 and fp16 were both asked for"),
        ([*REQUIRED, "--per_device_train_batch_size", "0"], "train_batch_size must be an integer of at least 1, got 0"),
        ([*REQUIRED, "--warmup_ratio", "1.5"], "--warmup_ratio must be a number between 0 and 1, got 1.5"),
        ([*REQUIRED, "--learning_rate=-1"], "--learning_rate must be a number of at least 0, got -1"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml cannot be read: No such file"),
        (["--config"], "--config needs the path"),
        ([*REQUIRED, "--optim", "adam"], "invalid choice: 'adam'"),
        ([*REQUIRED, "--optim", "adamw", "--save_steps", "5"], "--save_steps .*--optim adamw .* keeps no checkpoints"),
        (
            [*REQUIRED, "--optim", "sgd", "--resume_from_checkpoint", "auto"],
            "--resume_from_checkpoint was asked for.*leave it out, or train with --optim lomo or adalomo",
        ),
        ([*REQUIRED, "--optim", "adamw", "--load_best_model_at_end"], "--load_best_model_at_end was asked for"),
    ],
)
def test_invalid_settings_are_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse_arguments(argv)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", r"in .*run\.yaml: unknown argument --learning_rat; did you mean '--learning_rate'"),
        ("max_steps: many", r"in .*run\.yaml: .*invalid int value: 'many'"),
        ("- a\n- b", "must hold arguments as `name: value` lines, got list"),
        ("a: [1", "is not YAML"),
    ],
)
def test_invalid_yaml_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments(["--config", yaml_file(tmp_path, text)])


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("loging_steps", "logging_steps"),
        ("weigth_decay", "weight_decay"),
        ("max_step", "max_steps"),
        ("max_length", "max_seq_length"),
        ("max_seq_len", "max_seq_length"),
        ("gradient_accumulation", "gradient_accumulation_steps"),
        ("gradient_checkpoint", "gradient_checkpointing"),
        ("per_gpu_train_batch_size", "per_device_train_batch_size"),
        ("train_files", "train_file"),
        ("seeds", "seed"),
        *((name, None) for name in (
            "ddp_timeout", "do_train", "do_eval", "block_size", "save_strategy",
            "eval_strategy", "logging_strategy", "logging_dir", "eval_accumulation_steps", "warmup_steps", "run_name",
            "optimizer", "dataset_name", "fp8", "tf32", "fp32", "push_to_hub", "data_seed", "lr", "batch_size",
            "epochs", "save_only_model", "adam_beta1", "dataloader_num_workers", "group_by_length", "no_cuda",
        )),
    ],
)  # fmt: skip
def test_only_a_near_name_is_suggested(name: str, meant: str | None) -> None:
    ending = f"; did you mean '--{meant}'?" if meant else "; --help lists all"
    with pytest.raises(ConfigError) as refusal:
        parse_arguments([*REQUIRED, f"--{name}", "1"])
    assert str(refusal.value) == f"unknown argument --{name}{ending}"


def test_help_documents_every_field() -> None:
    text = help_text()
    for name in vars(parse_arguments(REQUIRED)[0]):
        assert f"--{name}" in text
    assert "--config FILE" in text
