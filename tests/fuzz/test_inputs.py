"""Fuzz tests of configs and text files: they work, or there is a one-line error message, never a traceback or hang."""

import copy
import dataclasses
import json
import re
import signal
import tempfile
import typing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from lomo_ds.config.arguments import TrainArguments, parse_arguments
from lomo_ds.config.ds_config import fill_scheduler, read_ds_config, reconcile, shared_fields
from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.config.lomo_config import LomoConfig
from lomo_ds.config.parameter import base_type
from lomo_ds.config.validation import validate_baseline_config, validate_ds_config
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.errors import ConfigError, DataError, LomoError
from lomo_ds.models import load_tokenizer
from tests.data.datasets import load
from tests.data.tokenizers import Letters

SECONDS = 60  # a test that takes longer is considered to hang
SHIPPED = [
    json.loads(path.read_text()) for path in sorted((Path(__file__).parent.parent.parent / "ds_configs").iterdir())
]
REQUIRED = ["--model_name_or_path", "m", "--train_file", "t.txt", "--output_dir", "o"]
ARGUMENTS = [field.name for field in dataclasses.fields(TrainArguments)]


def fuzz(examples: int) -> settings:
    """Return hypothesis settings with ``examples`` examples that are the same in every run."""
    return settings(max_examples=examples, deadline=None, derandomize=True)


@contextmanager
def time_limit() -> Iterator[None]:
    """Raise TimeoutError if the body takes longer than ``SECONDS``."""

    def on_timeout(*_: Any) -> None:
        raise TimeoutError(f"still running after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, on_timeout)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def limit_time() -> Iterator[None]:
    with time_limit():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextmanager
def allow_one_line_error(kind: type[LomoError]) -> Iterator[None]:
    """Suppress an error of ``kind`` whose message is one line; other errors propagate and fail the test."""
    refusal = None
    try:
        yield
    except kind as error:
        refusal = str(error)
    assert refusal is None or is_one_line(refusal)


def is_one_line(message: str) -> bool:
    return bool(message.strip()) and len(message.splitlines()) == 1 and "Traceback" not in message


# --- values of any type, under valid and invalid names

HUGE = [2**31, 2**63, 2**64, -(2**70), 10**400]
WORDS = ["", "auto", "none", "null", "nvme", "lomo", "1", "1e-3", "nan", "true", "fp16", "WarmupLR", "LRScheduler",
         "cpu", "stash", "immediate", "two_pass", "a\nb", "\u2028", "\ud800", "\0", "Adam"]  # fmt: skip
VALUES_OF_EACH_TYPE = [
    None,
    True,
    0,
    -1,
    3,
    10**400,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "auto",
    "x",
    [],
    ["x"],
    {},
    {"x": 1},
]
names = st.text(max_size=8) | st.sampled_from(["enabled", "type", "params", "stage", "device", "lr", "a.b", "a\nb"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(HUGE)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(WORDS)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=5
)

# --- ds_config

LOMO = [f"optimizer.params.{field.name}" for field in dataclasses.fields(LomoConfig)]
ZERO = [f"zero_optimization.{name}" for name in DeepSpeedZeroConfig.model_fields]
DEEPSPEED = [
    "optimizer", "scheduler", "zero_optimization", "bf16", "fp16", "torch_autocast", "activation_checkpointing",
    "comms_logger", "flops_profiler", "autotuning", "hybrid_engine", "pipeline", "compile", "data_efficiency",
    "checkpoint", "data_types", "aio", "timers", "tensor_parallel", "expert_parallel", "datastates_ckpt",
    "weight_quantization", "tensorboard", "wandb", "csv_monitor", "comet", "amp", "sparse_attention", "elasticity",
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "gradient_clipping", "prescale_gradients", "gradient_predivide_factor",
    "gradient_allreduce_op", "communication_data_type", "seq_parallel_communication_data_type",
    "sequence_parallel_size", "steps_per_print", "dump_state", "log_level", "vocabulary_size",
    "wall_clock_breakdown", "memory_breakdown", "dataloader_drop_last", "disable_allgather",
    "zero_allow_untested_optimizer", "optimizer.type", "optimizer.params", "optimizer.legacy_fusion",
    "optimizer.params.max_grad_norm", "scheduler.type", "scheduler.params", "scheduler.params.warmup_min_lr",
    "scheduler.params.warmup_max_lr", "scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps",
    "zero_optimization.offload_param.device", "zero_optimization.offload_param.pin_memory", "bf16.enabled",
    "bf16.bf16_optimizer_states", "fp16.enabled", "fp16.loss_scale", "fp16.initial_scale_power", "fp16.hysteresis",
    "fp16.fp16_master_weights_and_grads", "torch_autocast.enabled", "torch_autocast.dtype",
    "torch_autocast.lower_precision_safe_modules", "tensorboard.enabled", "tensorboard.output_path",
    "activation_checkpointing.number_checkpoints", "comms_logger.enabled", "flops_profiler.enabled",
    "autotuning.enabled", "autotuning.fast", "data_efficiency.enabled", "data_efficiency.data_sampling",
    "data_efficiency.data_sampling.curriculum_learning", "data_efficiency.data_routing",
    "checkpoint.tag_validation", "checkpoint.parallel_write", "checkpoint.parallel_write.pipeline_stage",
    "data_types.grad_accum_dtype", "data_types.keep_in_fp32_modules", "data_types.param_dtype",
    "data_types.buffer_dtype", "bfloat16", "zero_optimization.stage3_prefetch_bucket_size", "gradient_cliping",
    "aio.block_size", "timers.throughput",
    "tensor_parallel.autotp_size", "expert_parallel.enabled",
]  # fmt: skip
fields = st.sampled_from([*LOMO, *shared_fields()]) | st.sampled_from(DEEPSPEED) | st.sampled_from(ZERO) | names
replacements = st.lists(st.tuples(fields, values), min_size=1, max_size=4)
argument_lists = st.sampled_from(
    [
        [],
        ["--learning_rate", "0.5", "--seed", "7"],
        ["--fp16"],
        ["--warmup_ratio", "0.1", "--max_grad_norm", "0"],
        ["--optim", "adamw"],
        ["--optim", "sgd", "--learning_rate", "0.5"],
    ]
)


def replace_fields(config: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for path, value in changes:
        *sections, last = path.split(".")
        section = config
        for name in sections:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    return config


def prepare(config: dict[str, Any], argv: list[str]) -> tuple[DeepSpeedConfig, TrainArguments]:
    """Prepare a ds_config like ``train`` does before it loads a model."""
    arguments, given_names = parse_arguments([*REQUIRED, *argv])
    config, arguments = reconcile(config, arguments, given_names, world_size=1)
    config = fill_scheduler(config, arguments, total_steps=10)
    config = complete_ds_config(config, world_size=1)
    refuse = validate_ds_config if arguments.optim == "lomo" else validate_baseline_config
    refuse(config)
    return parse_ds_config(config), arguments


def check_ds_config(config: dict[str, Any], argv: list[str]) -> bool:
    """Return whether the config is accepted, and check that the config and the arguments agree."""
    before, is_accepted = repr(config), False
    with allow_one_line_error(ConfigError):
        parsed, arguments = prepare(config, argv)
        assert parsed.zero_optimization_stage == 3
        assert parsed.train_batch_size == (
            arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        )
        assert parsed.gradient_clipping == arguments.max_grad_norm
        assert (parsed.bfloat16_config.enabled, parsed.float16_config.enabled) == (arguments.bf16, arguments.fp16)
        for name in shared_fields().values():
            assert_right_type(arguments, name)
        is_accepted = True
    assert repr(config) == before, "the caller's config is unchanged"
    return is_accepted


def assert_right_type(arguments: TrainArguments, name: str) -> None:
    kind, value = typing.get_type_hints(TrainArguments)[name], getattr(arguments, name)
    if typing.get_origin(kind) is typing.Literal:
        assert value in typing.get_args(kind)
        return
    if value is None and type(None) in typing.get_args(kind):
        return
    kind = base_type(kind)
    assert type(value) is kind or (kind is float and type(value) is int), f"{name} is {value!r}"


@fuzz(150)
@given(st.sampled_from(SHIPPED), replacements, argument_lists)
def test_ds_config_of_any_values(config: dict[str, Any], changes: list[tuple[str, Any]], argv: list[str]) -> None:
    check_ds_config(replace_fields(config, changes), argv)


@pytest.mark.parametrize("path", dict.fromkeys([*LOMO, *shared_fields(), *DEEPSPEED, *ZERO]))
def test_each_single_field_of_a_ds_config(path: str) -> None:
    for value in VALUES_OF_EACH_TYPE:
        check_ds_config(replace_fields(SHIPPED[-1], [(path, value)]), [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("steps_per_print", 0),
        ("steps_per_print", "x"),
        ("log_level", "loud"),
        ("data_types.grad_accum_dtype", "fp7"),
        ("fp16.initial_scale_power", 2**40),
        ("scheduler", {"type": "Warmup"}),
        ("scheduler", {"type": "LRScheduler", "params": {}}),
        ("scheduler", {"type": "WarmupLR"}),
        ("scheduler", {"type": "WarmupLR", "params": {"warmup_max_lr": "x"}}),
        ("scheduler", {"type": "StepLR", "params": {"step_size": 0}}),
        ("scheduler", {"type": "ReduceLROnPlateau", "params": {}}),
        ("zero_optimization.zenflow", {}),
        ("tensor_parallel.autotp_size", 2),
        ("vocabulary_size", 10**400),  # DeepSpeed prints its config, in floats
    ],
    ids=lambda value: str(value)[:50],
)
def test_errors_are_raised_before_the_model_is_loaded(path: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        prepare(replace_fields(SHIPPED[-1], [(path, value)]), [])
    assert is_one_line(str(refusal.value))


def check_ds_config_file(folder: Path, content: bytes) -> bool:
    file = folder / "ds_config.json"
    file.write_bytes(content)
    with allow_one_line_error(ConfigError):
        return check_ds_config(read_ds_config(str(file)), [])
    return False


jsonish = st.text(alphabet='{}[]:,"\\\n ue019.-+ntrfalsNI', max_size=30)
corrupted = st.builds(  # a config with some bytes replaced
    lambda config, at, bytes_: json.dumps(config).encode()[:at] + bytes_ + json.dumps(config).encode()[at + 1 :],
    st.sampled_from(SHIPPED),
    st.integers(0, 300),
    st.binary(max_size=4) | jsonish.map(str.encode),
)


config_files = (
    st.binary(max_size=40) | (st.text() | jsonish).map(lambda text: text.encode(errors="replace")) | corrupted
)


@fuzz(150)
@given(content=config_files)
def test_ds_config_files_of_any_bytes(folder: Path, content: bytes) -> None:
    check_ds_config_file(folder, content)


@pytest.mark.parametrize("depth", [10, 100, 400, 900, 100_000])
@pytest.mark.parametrize(("left", "right"), ["[]", ('{"a": ', "}")])
def test_deeply_nested_ds_config_files(folder: Path, depth: int, left: str, right: str) -> None:
    nested = left * depth + "1" + right * depth
    check_ds_config_file(folder, b'{"zero_optimization": {"stage": 3}, "unknown": %b}' % nested.encode())
    check_ds_config_file(folder, left.encode() * depth)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('\ufeff{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}, "optimizer": {"type": "LOMO"}}', None),
        ('{"bf16": {"enabled": true, "enabled": false}}', r"Duplicate keys in DeepSpeed config: \['enabled'\]"),
        ('{"optimizer": {"params": {"lr": NaN}}}', "--learning_rate must be a number of at least 0, got nan"),
        ('{"optimizer": {"params": {"lr": true}}}', "optimizer.params.lr .* must be a number or .*, got True"),
        ('{"checkpoint": {"tag_validation": 5}, "bf16": {}, "optimizer": {"type": "LOMO"}, "zero_optimization": '
         '{"stage": 3}}', "another value in checkpoint of its config"),
    ],
)  # fmt: skip
def test_contents_of_a_ds_config_file(folder: Path, content: str, message: str | None) -> None:
    (folder / "ds_config.json").write_text(content)
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        prepare(read_ds_config(str(folder / "ds_config.json")), [])


# --- YAML and the command line


def check_arguments(argv: list[str]) -> TrainArguments | None:
    with allow_one_line_error(ConfigError):
        arguments, given_names = parse_arguments(argv)
        assert given_names <= set(ARGUMENTS)
        return arguments
    return None


def check_yaml(folder: Path, content: bytes) -> TrainArguments | None:
    file = folder / "run.yaml"
    file.write_bytes(content)
    return check_arguments([*REQUIRED, "--config", str(file)])


argument_names = st.sampled_from([*ARGUMENTS, "config", "learning_rat"]) | names
yaml_scalars = scalars | st.dates() | st.datetimes() | st.binary(max_size=8) | st.sets(st.integers(), max_size=2)
yaml_values = yaml_scalars | st.lists(yaml_scalars, max_size=2) | st.dictionaries(names, yaml_scalars, max_size=2)
yaml_texts = st.dictionaries(argument_names, yaml_values, max_size=4).map(yaml.safe_dump)
YAML_MARKS = [": ", "\n", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!!null ", "'", '"', "? ", "|\n ", "%", "#",
              "<<", "~", "...", "---", "\\ud800", "1", "yes", "\r", "\t"]  # fmt: skip
yamlish = st.lists(argument_names | st.sampled_from(YAML_MARKS), max_size=12).map("".join)


yaml_files = st.binary(max_size=40) | (st.text() | yaml_texts | yamlish).map(lambda text: text.encode(errors="replace"))


@fuzz(150)
@given(content=yaml_files)
def test_yaml_of_any_text(folder: Path, content: bytes) -> None:
    check_yaml(folder, content)


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))


@pytest.mark.parametrize(
    "text",
    [
        "seed: &a [*a]",
        "&a {seed: *a}",
        "&a ? *a\n: 1",
        "a0: &a0 x\n" + LAUGHS,
        "seed: " + "[" * 100_000,
        "seed: " + "[" * 500 + "]" * 500,
        "seed: " + "- " * 5_000 + "1",
        "? " * 5_000,
        "seed: " + "9" * 5_000,
        "seed: 0x" + "f" * 5_000,
        "seed: !!int x",
        "bf16: !!bool x",
        "seed: !!timestamp x",
        "seed: !!python/object/apply:os.abort []",
        "output_dir: 2024-13-45",
        "output_dir: 0001-01-01T00:00:00+23:00",
        "num_train_epochs: .inf",
        "num_train_epochs: 1e400",
        "seed: 1\nseed: 2",
        "max_steps: 100000000000000000000",
        "? [seed]\n: 1",
        "? {seed: 1}\n: 1",
        "a\0b: 1",
        '"a\\0\\n": 1',
        'train_file: "a\\0.txt"',
        'train_file: "a\\n.txt"',
        'sample_prompt: "\\ud800"',
        "--- {}\n--- {}",
        "",
        "~",
        "~: ~",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_tricky_yaml(folder: Path, text: str) -> None:
    for content in (text.encode(), text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), text.encode() + b"\xff"):
        check_yaml(folder, content)


@pytest.mark.parametrize(
    "word", ["yes", "007", "0x10", "1_000", "12:30", "2024-01-01", "1e3", "on", ".5", "=", "null "]
)
def test_a_name_in_yaml_is_read_literally(folder: Path, word: str) -> None:
    arguments = check_yaml(folder, f"validation_file: {word}x\ntokenizer_name: {word.strip()}\n".encode())
    assert arguments
    assert arguments.tokenizer_name == (None if word.strip() == "null" else word)


counts, shares = st.integers(1, 2**63 - 1), st.floats(0, 1)
unicode = st.text(st.characters(exclude_categories=["Cs"]))
file_names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1)
accepted = st.builds(
    TrainArguments,
    model_name_or_path=file_names,
    train_file=st.lists(file_names, min_size=1, max_size=3),
    output_dir=file_names,
    tokenizer_name=st.none() | file_names,
    max_steps=st.integers(-(2**63), 2**63 - 1),
    per_device_train_batch_size=counts,
    learning_rate=st.floats(0, allow_infinity=False),
    warmup_ratio=shares,
    gradient_checkpointing=st.booleans(),
    lr_scheduler_type=st.sampled_from(["linear", "cosine", "constant"]),
    sample_prompt=st.none() | unicode | st.sampled_from(["null", "~", "yes", "-1", "--seed", "1\r\n"]),
)


def check_dumped(folder: Path, arguments: TrainArguments) -> bool:
    arguments.dump(folder / "config.yaml")
    assert parse_arguments(["--config", str(folder / "config.yaml")])[0] == arguments
    return True


@fuzz(150)
@given(arguments=accepted)
def test_dumped_arguments_are_read_back(folder: Path, arguments: TrainArguments) -> None:
    check_dumped(folder, arguments)


words = (
    st.sampled_from([f"--{name}" for name in [*ARGUMENTS, "config"]])
    | st.builds("--{}={}".format, argument_names, st.text(max_size=5) | st.integers())
    | st.sampled_from(["--", "-", "-1", "--=", "--bf16", "--help", "-x", "8", "nan", "9" * 5_000, *WORDS])
    | st.text(max_size=8)
)


command_lines = st.builds(list.__add__, st.sampled_from([[], REQUIRED]), st.lists(words, max_size=6))


@fuzz(150)
@given(argv=command_lines)
def test_command_lines_of_any_words(argv: list[str]) -> None:
    check_arguments(argv)


# --- text files


def reference_rows(content: bytes) -> tuple[list[str], int | None]:
    """Return the documents of a .jsonl file, read naively, and the number of the first invalid row."""
    documents = []
    for number, line in enumerate(content.removeprefix("\ufeff".encode()).split(b"\n"), start=1):
        try:
            text = json.loads(line.decode())["text"] if line.decode().strip() else ""
            assert text.encode().decode() == text
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return [], number
        documents.append(text)
    return [document for document in documents if document.strip()], None


def check_text_file(file: Path, expected: list[str], bad_line: int | None = None) -> bool:
    """Return whether the file is read, and check its documents and tokens, or else the error message."""
    try:
        assert tokens_of(file, Letters()) == [token for text in expected for token in [0, *map(ord, text), 1]]
        refusal = ""
    except DataError as error:
        refusal = str(error)
        assert is_one_line(refusal)
        assert str(file) in refusal
    assert bool(refusal) == (expected == [])
    assert bad_line is None or re.search(rf"line {bad_line}\b", refusal)
    return not refusal


def tokens_of(file: Path, tokenizer: Any) -> list[int]:
    with tempfile.TemporaryDirectory() as cache:
        return load(file, tokenizer, Path(cache)).ids.tolist()


nasty_text = unicode | st.sampled_from(
    ["\0", "a\u2028b\x85\x1cc\r\nd\re", "\ufeff", "\U0010ffff\uffff", "  ", "\\ud800"]
)
rows = st.fixed_dictionaries({"text": nasty_text}, optional={"id": values}) | st.dictionaries(names, values) | values
row_bytes = st.builds(
    lambda row, ascii_: json.dumps(row, ensure_ascii=ascii_).encode(errors="surrogatepass"), rows, st.booleans()
)
any_bytes = st.binary(max_size=20) | jsonish.map(str.encode) | st.sampled_from([b"", b" \t", b"\r", b"\xef\xbb\xbf"])
line_ends = st.sampled_from([b"\n", b"\r\n", b"\n\n"])


@fuzz(150)
@given(documents=st.lists(nasty_text), ascii_=st.booleans(), end=line_ends, mark=st.sampled_from(["", "\ufeff"]))
def test_documents_written_as_json_are_read_back(
    folder: Path, documents: list[str], ascii_: bool, end: bytes, mark: str
) -> None:
    file = folder / "documents.jsonl"
    lines = [json.dumps({"text": document}, ensure_ascii=ascii_).encode() for document in documents]
    file.write_bytes(mark.encode() + end.join(lines))
    check_text_file(file, [document for document in documents if document.strip()])


right_rows = st.builds(json.dumps, st.fixed_dictionaries({"text": nasty_text})).map(str.encode)
jsonl_files = st.builds(
    bytes.join, line_ends, st.lists(row_bytes | any_bytes, max_size=4) | st.lists(right_rows, max_size=4)
)
txt_files = st.lists(nasty_text.map(str.encode) | any_bytes, max_size=4).map(b"".join)


def check_jsonl(folder: Path, content: bytes) -> bool:
    file = folder / "rows.jsonl"
    file.write_bytes(content)
    return check_text_file(file, *reference_rows(content))


@fuzz(150)
@given(content=jsonl_files)
def test_jsonl_of_any_rows(folder: Path, content: bytes) -> None:
    check_jsonl(folder, content)


def check_txt(folder: Path, content: bytes) -> bool:
    file = folder / "text.txt"
    file.write_bytes(content)
    try:
        text = content.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        text = ""
    return check_text_file(file, [text] if text.strip() else [])


@fuzz(150)
@given(content=txt_files)
def test_txt_of_any_bytes(folder: Path, content: bytes) -> None:
    check_txt(folder, content)


MEGABYTE = 2**20


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ('{"text": "' + "x" * 6 * MEGABYTE + '"}', "x" * 6 * MEGABYTE),
        ('{"text": "' + "\\u0000" * MEGABYTE + '"}', "\0" * MEGABYTE),
        ('{"text": "' + "\\ud83d\\ude00" * 99_999 + '"}', "\N{GRINNING FACE}" * 99_999),
        ('{"text": "a", "id": ' + "9" * MEGABYTE + "}", "a"),
        ('{"text": "a", "id": "' + "x" * 6 * MEGABYTE + '"}', "a"),
        ('{"text": "a", "id": ' + "[" * 100 + "]" * 100 + "}", "a"),
        ('{"text": "a", "id": ' + "[" * 100_000 + "]" * 100_000 + "}", None),
        ('{"text": "' + "x" * 6 * MEGABYTE, None),
        ('{"text": ' + "9" * MEGABYTE + "}", None),
        ('{"' + "x\\n" * MEGABYTE + '": 1}', None),
        ("{" + ", ".join(f'"a{n}": 1' for n in range(99_999)) + "}", None),
        ('{"text": "a\\ud800"}', None),
        ("[" * MEGABYTE, None),
        ("\0" * MEGABYTE, None),
        ("x" * MEGABYTE, None),
    ],
    ids=lambda value: repr(value[:20]) if value else "refused",
)  # fmt: skip
def test_huge_and_deep_rows(folder: Path, row: str, text: str | None) -> None:
    file = folder / "huge.jsonl"
    file.write_text(f'{{"text": "before"}}\r\n{row}\n')
    check_text_file(file, ["before", text] if text else [], None if text else 2)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_paths_that_are_not_text_files(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / f"empty{suffix}").touch()
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    for name in ("folder", "empty", "loop", "nowhere", "x" * 300):
        check_text_file(tmp_path / f"{name}{suffix}", [])


@pytest.mark.parametrize(
    "name", ["x" * 251, "\N{GRINNING FACE}" * 62, "caf\udce9", "a b\tc"], ids=["long", "bytes", "latin", "blanks"]
)
def test_any_file_name(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.txt").write_text("text")
    check_text_file(tmp_path / f"{name}.txt", ["text"])


@pytest.mark.parametrize(
    "document",
    [
        "\0",
        "a\0b",
        "\ufeff\u2028\x85",
        "\ufffe\uffff\U0010ffff",
        "e\u0301" * 9,
        "</s><s><unk>",
        "x\r\ry",
        "x" * MEGABYTE,
    ],
)
def test_a_model_tokenizer_round_trips_unusual_text(demo: Path, tmp_path: Path, document: str) -> None:
    tokenizer = load_tokenizer(str(demo / "model"))
    file = tmp_path / "nasty.jsonl"
    file.write_text(json.dumps({"text": document}))
    begin, *ids, end = tokens_of(file, tokenizer)
    assert (begin, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids) == document


def test_the_error_of_a_failing_tokenizer_names_the_file(tmp_path: Path) -> None:
    class Failing(Letters):
        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            raise Exception("no unknown\ntoken")  # like the tokenizers library does

    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"fails at .*a\.txt: no unknown token$"):
        tokens_of(tmp_path / "a.txt", Failing())
