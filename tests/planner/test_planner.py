"""The planner: predictions match measurements, advised settings fit, and suggested configs run."""

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed.comm as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.lib.workload import LARGE, SHAPES, TINY, Workload
from lomo_ds.config.arguments import parse_arguments
from lomo_ds.config.ds_config import fill_scheduler, read_ds_config, reconcile
from lomo_ds.config.validation import validate_ds_config
from lomo_ds.engine.ds_parse import parse_ds_config
from lomo_ds.errors import ConfigError, ModelError
from lomo_ds.planner import (
    Machine,
    Plan,
    PlannedModel,
    Settings,
    advise,
    check_host_memory,
    command_line,
    parse_bytes,
    parse_rate,
    plan_as_dict,
    plan_run,
    settings_of,
    suggested_ds_config,
)
from lomo_ds.planner.command import main
from lomo_ds.planner.gathered_params import RELEASED
from lomo_ds.planner.step_memory import CONTEXT, GATHERED, SHARDS, STASH, STATE
from lomo_ds.planner.trace import trace_step
from lomo_ds.zero3.gathering import AHEAD_NUMEL
from tests.launching import ROOT, demo_arguments, run_main
from tests.limits import HUNG
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
GIB = 2**30
OFFLOAD = {"offload_param": {"device": "cpu"}}
TWO_LAYERS = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip


def tiny(**changes: Any) -> PlannedModel:
    from transformers import LlamaConfig

    return PlannedModel(LlamaConfig(**TWO_LAYERS | changes), "tiny")


@pytest.fixture(scope="module")
def llama_7b() -> PlannedModel:
    return PlannedModel.load("7b")


@pytest.fixture(scope="module")
def llama_65b() -> PlannedModel:
    return PlannedModel.load("65b")


# predictions


def measured_peak(method: str, work: Workload) -> int:
    """Return a rank's peak bytes of live tensors in a step, without the tensors that other tests have left behind."""
    from benchmarks.lib import footprint, methods

    before = storages()
    peak = int(footprint.measure(methods.build(method, work))["peak"])
    return peak - sum(size for _, size in before & storages())


def storages() -> set[tuple[int, int]]:
    """Return address and bytes of every live CPU storage."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    strided = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return {(storage._cdata, storage.nbytes()) for storage in strided if storage.device.type == "cpu"}


@pytest.mark.parametrize(
    ("method", "world_size", "work"),
    [
        ("immediate", 2, Workload("40m", 64, 1, checkpointing=True, zero=LARGE)),
        ("stash+clip", 2, Workload(TINY, 64, 4, zero=LARGE)),
        ("stash+clip", 2, Workload(TINY, 128, 2, precision="bf16", checkpointing=True)),
        ("two_pass+clip", 2, Workload(TINY, 128, 4, zero=LARGE, lomo={"gather_granularity": "module"})),
        ("deepspeed-adamw", 2, Workload(TINY, 64, 2, checkpointing=True, zero=LARGE)),
        ("deepspeed-sgd", 2, Workload(TINY, 128, 2, precision="bf16", zero=LARGE)),
        ("immediate", 2, Workload(TINY, 128, 4, checkpointing=True, tiled_logits=True, zero=LARGE)),
        ("stash+clip", 1, Workload(TINY, 128, 2)),
        ("immediate", 2, Workload(TINY, 64, 2, zero=LARGE | OFFLOAD)),
        ("two_pass+clip", 1, Workload(TINY, 64, 2, precision="bf16", checkpointing=True, zero=OFFLOAD)),
        ("immediate", 4, Workload(TINY, 64, 4, zero=LARGE)),
        ("immediate", 3, Workload(TINY, 64, 2, checkpointing=True, zero=LARGE)),
        ("immediate+int8", 2, Workload(TINY, 64, 2, precision="bf16", checkpointing=True, zero=LARGE | OFFLOAD)),
        ("immediate", 2, Workload(TINY, 64, 2, zero=LARGE | {"zero_quantized_weights": True})),
        ("stash+clip", 2, Workload(TINY, 64, 2, precision="bf16", communication_data_type="fp32", zero=LARGE)),
        ("adalomo", 2, Workload("40m", 64, 1, checkpointing=True, zero=LARGE)),
        ("adalomo", 1, Workload(TINY, 64, 2)),
        ("adalomo", 3, Workload(TINY, 64, 2, checkpointing=True, zero=LARGE)),
        ("adalomo+clip", 2, Workload(TINY, 64, 2, checkpointing=True, zero=LARGE)),
        ("adalomo+clip", 2, Workload(TINY, 64, 4, zero=LARGE, lomo={"update_schedule": "two_pass"})),
        ("adalomo", 2, Workload(TINY, 64, 1, checkpointing=True, zero=LARGE, lomo={"clip_group_norm": 1.0})),
        ("adalomo", 2, Workload(TINY, 64, 2, checkpointing=True, zero=LARGE | OFFLOAD)),
        ("adalomo+int8", 2, Workload(TINY, 64, 2, precision="bf16", checkpointing=True, zero=LARGE)),
        ("adalomo+int8", 2, Workload(TINY, 64, 2, precision="bf16", checkpointing=True, zero=LARGE | OFFLOAD)),
        ("immediate", 1, Workload(TINY, 512, 2, documents=3)),
        ("stash+clip", 2, Workload(TINY, 1024, 1, precision="bf16", checkpointing=True, documents=2)),
    ],
)
def test_the_predicted_peak_equals_the_measured_one(
    ranks: GroupOf, method: str, world_size: int, work: Workload
) -> None:
    from benchmarks.lib.planned import planned_peak

    planned = planned_peak(method, work, world_size, "cpu")
    measured = max(ranks(world_size).run(measured_peak, method, work))
    assert planned == pytest.approx(measured, rel=0.05)


def rule_state_bytes(method: str, work: Workload) -> int:
    from benchmarks.lib import methods

    return sum(tensor.nbytes for tensor in methods.build(method, work).optimizer_state())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_predicted_rule_state_equals_the_allocated_one(ranks: GroupOf, world_size: int) -> None:
    from benchmarks.lib.planned import ample_machine, plan_method

    for method in ("immediate", "adalomo"):
        plan = plan_method(method, Workload(TINY, 64), world_size, ample_machine("cpu"))
        assert plan is not None
        allocated = ranks(world_size).run(rule_state_bytes, method, Workload(TINY, 64))
        assert plan.memory.at_peak[STATE] == max(allocated)
        assert (max(allocated) > 0) == (method == "adalomo")


@pytest.mark.parametrize("gpus", [1, 8])
def test_adalomo_keeps_10_megabytes_for_7b_on_every_gpu(llama_7b: PlannedModel, gpus: int) -> None:
    plan = plan_run(llama_7b, Settings(gpus=gpus, optimizer="adalomo", gradient_clipping=0.0), Machine())
    rows_and_columns = 32 * (4 * 2 * 4096 + 3 * (4096 + 11008)) + 2 * (32000 + 4096)
    assert plan.memory.at_peak[STATE] == 4 * (rows_and_columns + 65 * 4096 // gpus)
    assert 4 * rows_and_columns == pytest.approx(10.3e6, rel=0.01)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("gpus", [1, 2])
def test_extrapolated_trace_equals_the_trace_of_all_layers(checkpointing: bool, gpus: int) -> None:
    from transformers import LlamaConfig

    run = Settings(gpus=gpus, sequence=32, batch=2, precision="fp32", gradient_checkpointing=checkpointing)
    config = LlamaConfig(**SHAPES[TINY])
    short, full = trace_step(config, run), trace_step(config, run, every_layer=True)
    assert short == full
    for event, expected in zip(short.events, full.events, strict=True):
        assert +short.sizes_of(event.live_at_peak) == full.sizes_of(expected.live_at_peak)
        assert short.sizes_of(event.live_at_peak).total() == event.peak
        assert short.sizes_of(event.live).total() == event.level


def test_flops_are_those_of_matrix_products_and_attention() -> None:
    from benchmarks.lib.workload import flops_per_token

    work = Workload(TINY, 64, 2)
    run = Settings(gpus=1, sequence=work.sequence, batch=work.batch, tiled_logits=False)
    counted = trace_step(work.config(), run).flops
    half_of_attention = (
        6 * 16 * 64 * work.sequence * work.tokens
    )  # skipped by a causal kernel, and recomputed in backward
    assert counted == pytest.approx(flops_per_token(work) * work.tokens, abs=half_of_attention)


def test_an_architecture_with_its_own_forward_can_be_planned() -> None:
    from transformers import GPT2Config

    model = PlannedModel(GPT2Config(n_embd=32, n_layer=6, n_head=2, vocab_size=128, n_positions=64), "gpt2")
    plan = plan_run(model, Settings(gpus=2, sequence=32, gradient_clipping=0), Machine())
    assert plan.fits
    assert not plan.tiled


# placement


def test_int8_shards_take_a_byte_and_a_scale_for_each_block() -> None:
    model = tiny()
    for int8, size in ((False, 2.0), (True, 1.0 + 2 / 64)):
        plan = plan_run(model, Settings(gpus=2, sequence=32, weights="int8" if int8 else "auto"), Machine())
        assert plan.memory.at_peak[SHARDS] == pytest.approx(size * model.numel / 2, rel=0.01)


def test_released_parameters_are_freed_late_if_the_host_runs_ahead_of_its_gpu(llama_7b: PlannedModel) -> None:
    run = Settings(gradient_clipping=0.0, gradient_checkpointing=True, gather_granularity="module")

    def released_bytes(run: Settings, machine: Machine) -> int:
        return plan_run(llama_7b, run, machine, by_name=True).memory.sizes.get((GATHERED, RELEASED), 0)

    from_host, largest = run.but(offload_param="cpu"), 32000 * 4096  # the embedding, which is prefetched then
    assert 0 < released_bytes(from_host, Machine()) <= 2 * (largest + AHEAD_NUMEL) * run.dtype.itemsize
    assert released_bytes(run.but(gpus=2), Machine()) == 0, "gathers and compute reuse memory in one stream"
    assert released_bytes(from_host, Machine(device="cpu")) == 0


def test_a_host_pins_the_memory_of_all_its_ranks(llama_65b: PlannedModel) -> None:
    run = Settings(gpus=8, gradient_checkpointing=True, update_schedule="stash", stash_device="cpu")
    run = run.but(offload_param="cpu")
    machine = Machine(host_memory=256 * GIB)
    plan = plan_run(llama_65b, run, machine)
    whole = 2 * llama_65b.numel
    assert plan.pinned_host_bytes.keys() == {SHARDS, STASH}
    assert 2 * whole < plan.host_bytes < 1.1 * 2 * whole, "the unused rest of a slab is pinned too"
    assert plan.fits_gpu
    assert not plan.fits_host
    with pytest.raises(
        ConfigError, match=r"would pin 24\d\.\d GiB .* only 204\.8 of its 256\.0 GiB may be pinned; it fits with"
    ):
        check_host_memory(plan, str(advise(plan, llama_65b)))
    spread = plan_run(llama_65b, run.but(hosts=2), machine)
    assert spread.host_bytes == plan.host_bytes // 2
    check_host_memory(spread, None)


# speed


def test_one_gpu_with_a_fast_link_outruns_the_papers_eight_on_65b(llama_65b: PlannedModel) -> None:
    """The paper (arXiv 2306.09782, Table 2) reports 4.93 tokens per second on each of eight RTX 3090."""
    run = Settings(offload_param="cpu", gradient_checkpointing=True, gradient_clipping=0, sequence=1024)
    plan = plan_run(llama_65b, run, Machine(host_memory=256 * GIB, pcie=24e9))
    assert plan.fits
    assert plan.tokens_per_second > 8 * 4.93
    whole = 2 * llama_65b.numel
    sizes = {name: 2 * parameter.numel() for name, parameter in llama_65b.meta_model.named_parameters()}
    # backward finds the head and the last layer still gathered
    once = sum(size for name, size in sizes.items() if name.startswith(("lm_head", "model.layers.79.")))
    assert plan.time.link_bytes["link up"] == pytest.approx(2 * whole - once, rel=0.001), "gathered twice"
    assert plan.time.link_bytes["link down"] == pytest.approx(whole, rel=0.01), "written once"


def test_quantized_gathers_and_the_communication_type_change_the_traffic() -> None:
    model = tiny(hidden_size=256, num_hidden_layers=6)
    lean = {"max_live_parameters": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 0, "persistence_threshold": 0}
    run = Settings(gpus=4, sequence=32, gradient_clipping=0.0, **lean)  # type: ignore[arg-type]

    def sent_per_parameter(**changes: Any) -> float:
        sent = plan_run(model, run.but(**changes), Machine()).time.link_bytes["between GPUs"]
        return sent / model.numel / (3 / 4)

    assert sent_per_parameter() == pytest.approx(2 + 2 + 2, rel=0.01)
    assert sent_per_parameter(zero_quantized_weights=True) == pytest.approx(2 * (1 + 2 / 64) + 2, rel=0.01)
    assert sent_per_parameter(communication_data_type="fp32") == pytest.approx(2 + 2 + 4, rel=0.01)


@pytest.mark.parametrize(("schedule", "units"), [("immediate", 3), ("stash", 3), ("two_pass", 6)])
def test_gpus_exchange_the_bytes_of_the_schedule(schedule: Any, units: int) -> None:
    model = tiny(hidden_size=256, num_hidden_layers=6)
    limits: dict[str, Any] = {
        "max_live_parameters": 0,
        "max_reuse_distance": 0,
        "prefetch_bucket_size": 0,
        "persistence_threshold": 0,
    }
    clip = 0.0 if schedule == "immediate" else 1.0
    run = Settings(gpus=4, sequence=32, update_schedule=schedule, stash_device="gpu", gradient_clipping=clip, **limits)
    run = run.but(persistence_threshold=0)
    plan = plan_run(model, run, Machine())
    sent = plan.time.link_bytes["between GPUs"]
    assert sent == pytest.approx(units * 2 * model.numel * 3 / 4, rel=0.01)


def test_the_bottleneck_is_the_slowest_part() -> None:
    run = Settings(gpus=2, sequence=32)
    model = tiny()
    assert plan_run(model, run, Machine(flops=1e3)).time.bottleneck_name == "arithmetic"
    assert plan_run(model, run, Machine(pcie=1.0)).time.bottleneck_name == "the link"
    assert plan_run(model, run, Machine(gpu_link=1.0)).time.bottleneck_name == "the link between GPUs"
    slow_disk = Machine(nvme=1.0)
    assert plan_run(model, run.but(offload_param="nvme"), slow_disk).time.bottleneck_name == "the disk"


# advice


ADVISED = [
    ("7b", Settings(sequence=512, batch=8), Machine()),
    ("7b", Settings(sequence=4096, batch=8), Machine()),
    ("7b", Settings(sequence=2048, tiled_logits=False), Machine(16 * GIB, 32 * GIB)),
    ("7b", Settings(gpus=2, sequence=1024, accumulation_steps=4, accumulation="stash"), Machine(12 * GIB, 64 * GIB)),
    ("7b", Settings(gpus=2, sequence=1024, accumulation_steps=64), Machine(12 * GIB, 64 * GIB)),
    ("7b", Settings(gpus=2, optimizer="adamw"), Machine(host_memory=64 * GIB)),
    ("7b", Settings(sequence=512, batch=8, optimizer="adalomo", gradient_clipping=0.0), Machine()),
    ("65b", Settings(gpus=8), Machine(host_memory=256 * GIB)),
    ("65b", Settings(gpus=1, batch=4), Machine(12 * GIB, 64 * GIB)),
]


@pytest.mark.parametrize(("name", "run", "machine"), ADVISED)
def test_advised_settings_fit_and_can_be_launched(
    name: str, run: Settings, machine: Machine, llama_7b: PlannedModel, llama_65b: PlannedModel, tmp_path: Path
) -> None:
    model = {"7b": llama_7b, "65b": llama_65b}[name]
    plan = plan_run(model, run, machine)
    assert not plan.fits
    advice = advise(plan, model)
    assert advice is not None
    assert plan_run(model, advice.plan.settings, machine).fits
    ds_config = config_as_launched(advice.plan, tmp_path)
    settings_read = settings_of(
        ds_config,
        **{
            field: getattr(advice.plan.settings, field)
            for field in ("gpus", "hosts", "sequence", "gradient_checkpointing", "tiled_logits", "activation_offload")
        },
    )
    assert settings_read == advice.plan.settings


def config_as_launched(plan: Plan, folder: Path) -> dict[str, Any]:
    """Return the suggested config after launch/train.py has read and checked it with the suggested arguments."""
    file = folder / "suggested.json"
    file.write_text(json.dumps(suggested_ds_config(plan)))
    words = command_line(plan).replace("FILE", str(file)).split()
    argv = [*words[words.index("launch/train.py") + 1 : -1], "--train_file", "text.txt", "--output_dir", "out"]
    arguments, given_names = parse_arguments(argv)
    ds_config, arguments = reconcile(read_ds_config(str(file)), arguments, given_names, plan.settings.gpus)
    assert arguments.gradient_checkpointing == plan.settings.gradient_checkpointing
    ds_config = fill_scheduler(ds_config, arguments, total_steps=10)
    if not plan.settings.is_baseline:
        validate_ds_config(ds_config)
    parse_ds_config(ds_config | {"train_batch_size": plan.settings.batch * plan.settings.accumulation_steps})
    return ds_config


def test_the_smallest_change_comes_first(llama_7b: PlannedModel) -> None:
    plan = plan_run(llama_7b, Settings(sequence=512, batch=8), Machine())
    advice = advise(plan, llama_7b)
    assert advice is not None
    assert advice.changes == ("--gradient_checkpointing",)
    assert advise(advice.plan, llama_7b) is None, "a plan that fits needs no advice"


def test_a_plan_for_nvme_needs_to_know_the_disk() -> None:
    with pytest.raises(ConfigError, match="give --nvme, for example 3GB/s"):
        plan_run(tiny(), Settings(sequence=32, offload_param="nvme"), Machine())


def test_a_config_for_nvme_needs_a_folder() -> None:
    plan = plan_run(tiny(), Settings(sequence=32, offload_param="nvme"), Machine(nvme=3e9))
    with pytest.raises(ConfigError, match="give --nvme_path"):
        suggested_ds_config(plan)
    zero = suggested_ds_config(plan, "/local")["zero_optimization"]
    assert zero["offload_param"] == {"device": "nvme", "pin_memory": True, "nvme_path": "/local"}


MODEL = tiny()


@settings(max_examples=60, deadline=None)
@given(
    run=st.builds(
        Settings,
        gpus=st.sampled_from([1, 2, 8]),
        sequence=st.sampled_from([16, 64]),
        batch=st.sampled_from([1, 4]),
        update_schedule=st.sampled_from(["stash", "two_pass"]),
        stash_device=st.sampled_from(["gpu", "cpu"]),
        gather_granularity=st.sampled_from(["module", "layer"]),
        gradient_checkpointing=st.booleans(),
        offload_param=st.sampled_from(["none", "cpu"]),
    ),
    tight=st.integers(0, 4_000_000),
    more=st.integers(0, 8_000_000),
)
def test_more_memory_never_makes_a_plan_unfit(run: Settings, tight: int, more: int) -> None:
    context = Machine().context
    small, large = (Machine(context + 1 + size, 2**28 + 1000 * size) for size in (tight, tight + more))
    before, after = plan_run(MODEL, run, small, by_name=True), plan_run(MODEL, run, large)
    assert after.fits or not before.fits
    assert before.gpu_bytes == sum(before.memory.at_peak.values()) > before.memory.at_peak[CONTEXT]
    assert before.gpu_bytes == sum(before.memory.sizes.values())
    assert min(before.memory.sizes.values()) >= 0


# output


COMMAND = [
    "--model_name_or_path=40m", "--num_gpus=2", "--max_seq_length=128", "--per_device_train_batch_size=1",
]  # fmt: skip
OFFLOADED = "--deepspeed=zero3_bf16_offload_cpu"


def test_text_output(capsys: pytest.CaptureFixture[str]) -> None:
    main(COMMAND)
    output = capsys.readouterr().out
    for words in ("parameter shard", "gathered", "stash", "seconds of a step", "tokens/s", "bound by", "60 % of 71"):
        assert words in output
    assert "\nplan: " in output


def test_moments_lists_the_tensors_of_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--per_device_train_batch_size=8", "--gradient_checkpointing", "--tiled_logits=false", "--moments"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("GiB on each GPU at the peak (in backward, before lm_head.weight): ")
    sizes = [float(row.split()[0]) for row in rows]
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert sum(sizes) == pytest.approx(float(head.rpartition(" ")[2]), abs=0.0005 * (len(rows) + 1))
    logits = f"{8 * 128 * 32000 * 4 / GIB:.3f}"
    for words in ("model: log_softmax, float32 1024 x 32000", "model: nll_loss_backward, float32 1024 x 32000"):
        assert sum(row.split()[0] == logits and row.endswith(words) for row in rows) == 1


def test_json_output(capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--json", "--gpu_memory=1GB", "--per_device_train_batch_size=64", "--host_memory=64GB"])
    output = json.loads(capsys.readouterr().out)
    assert output["fits"] is False
    assert output["gpu_bytes"]["total"] == sum(output["gpu_bytes"]["by_kind"].values()) > GIB
    assert output["seconds"]["step"] > 0
    assert output["advice"]["plan"]["fits"]
    assert (
        json.loads(json.dumps(plan_as_dict(plan_run(tiny(), Settings(sequence=32), Machine()), None)))["advice"] is None
    )


def test_a_plan_of_adalomo_names_it_and_suggests_its_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds_config.json"
    main([*COMMAND, "--optim=adalomo", f"--suggest={file}"])
    output = capsys.readouterr().out
    assert "\noptimizer: adalomo\nschedule: immediate (" in output
    assert "rule state" in output
    assert read_ds_config(str(file))["optimizer"]["type"] == "AdaLomo"
    main([*COMMAND, f"--deepspeed={file}"])
    assert capsys.readouterr().out == output, "the suggested config gives the same plan"


def test_a_suggestion_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ds_config.json"
    main([*COMMAND, OFFLOADED, f"--suggest={file}"])
    assert read_ds_config(str(file))["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    with pytest.raises(ConfigError, match=r"--suggest .* cannot be written"):
        main([*COMMAND, f"--suggest={tmp_path}"])


def test_the_script_runs_without_ranks_and_without_gpu() -> None:
    command = [sys.executable, str(ROOT / "launch/plan.py"), *COMMAND, "--pcie=fast"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, cwd=ROOT)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines()[-1] == "error: --pcie must be a rate such as 16GB/s, got 'fast'"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpu_memory=24"], None),
        (["--gpu_memory=24XB"], "--gpu_memory must be an amount of memory such as 24GB or 512MiB, got '24XB'"),
        (["--gpu_memory=0GB"], "--gpu_memory must be an amount"),
        (["--host_memory=-5GB"], "--host_memory must be an amount"),
        (["--pcie=16GB"], "--pcie must be a rate such as 16GB/s, got '16GB'"),
        (["--num_gpus=0"], "--num_gpus must be an integer of at least 1, got 0"),
        (["--max_seq_length=1"], "--max_seq_length must be an integer of at least 2, got 1"),
        (["--tflops=nan"], "--tflops must be a number above 0, got nan"),
        (["--utilisation=1.5"], "--utilisation must be a number above 0 and at most 1, got 1.5"),
        (["--update_schedule=immediate", "--max_grad_norm=1"], "update_schedule immediate cannot honour"),
        (
            ["--update_schedule=two_pass", "--gradient_accumulation_steps=2", "--accumulation=stash"],
            "two_pass keeps no gradients, which accumulation stash needs",
        ),
        (["--activation_offload"], "--gradient_checkpointing keeps"),
        (["--max_grad_norm=-1"], "--max_grad_norm must be a number of at least 0"),
        (["--optim=adamw", "--weights=int8"], "--weights cannot be used with --optim adamw"),
        (["--model_name_or_path=nowhere"], "got nowhere"),
    ],
)
def test_invalid_arguments_raise_a_clear_error(argv: list[str], message: str | None) -> None:
    if message is None:
        assert parse_bytes(argv[0].partition("=")[2]) == 24
        return
    with pytest.raises((ConfigError, ModelError)) as raised:
        main([*COMMAND, *argv])
    assert message in str(raised.value)


def test_units() -> None:
    assert parse_bytes("24GB") == parse_bytes("24 GiB") == parse_bytes("24g") == 24 * GIB
    assert parse_bytes("1.5TB") == 1.5 * 1024 * GIB
    assert parse_rate("16GB/s") == 16e9
    assert parse_rate("500 MB/s") == 5e8


# within a job


def test_a_job_logs_its_plan(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    """Only rank 0 logs it, before the model is loaded."""
    logged = ranks(2).run(run_and_read_log, demo_arguments(demo, tmp_path, max_steps=1))
    assert [len(lines) for lines in logged] == [1, 0]
    assert re.fullmatch(r"plan: \d+\.\d MiB of \d+\.\d GiB a rank", logged[0][0])


def run_with_slow_link(argv: list[str]) -> list[str]:
    """Run a job whose plan is made for two GPUs with a slow link, and return what is logged about it."""
    machine = Machine(64 * GIB, 64 * GIB, gpu_link=1e6)
    with mock.patch("lomo_ds.train.preflight.detect_machine", return_value=machine):
        return run_and_read_log(argv)


def test_a_job_that_waits_for_a_link_logs_the_step_that_does_not(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    logged = ranks(2).run(run_with_slow_link, demo_arguments(demo, tmp_path, max_steps=1))
    assert [len(lines) for lines in logged] == [2, 0]
    assert logged[0][1].startswith("plan: bound by the link between GPUs: --gradient_accumulation_steps ")


def run_as_planned(argv: list[str], planned: dict[str, str]) -> dict[str, str]:
    """Run a job in which rank 0 plans these choices; return those of the engine of this rank."""
    from lomo_ds.engine.lomo import LomoEngine
    from lomo_ds.train.preflight import MemoryPreflight

    def plan(self: MemoryPreflight) -> None:
        self.chosen = planned if dist.get_rank() == 0 else {}

    chosen: list[dict[str, str]] = []
    take_step = LomoEngine._take_step

    def watch(self: LomoEngine, step_batch: Any) -> float:
        chosen.append(self.optimizer.chosen_settings)
        return take_step(self, step_batch)

    with mock.patch.object(MemoryPreflight, "log", plan), mock.patch.object(LomoEngine, "_take_step", watch):
        status, _, errors = run_main(argv)
    assert status == 0, errors
    return chosen[0]


LEANER = {"accumulation": "stash", "gather_granularity": "module"}
FASTER = {"accumulation": "layered", "gather_granularity": "layer"}


@pytest.mark.parametrize(("planned", "used"), [(LEANER, LEANER), (FASTER, FASTER), ({}, FASTER)], ids=str)
def test_a_job_accumulates_and_gathers_as_planned(
    ranks: GroupOf, demo: Path, tmp_path: Path, planned: dict[str, str], used: dict[str, str]
) -> None:
    argv = demo_arguments(demo, tmp_path, max_steps=1, gradient_accumulation_steps=2)
    for chosen in ranks(2).run(run_as_planned, argv, planned):
        assert {name: chosen[name] for name in used} == used


def run_and_read_log(argv: list[str]) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lomo_ds.train.preflight")
    logger.addHandler(handler)
    try:
        status, _, errors = run_main(argv)
    finally:
        logger.removeHandler(handler)
    assert status == 0, errors
    return lines


def test_an_out_of_memory_error_says_which_settings_fit(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    (status, _, error), (_, _, other_error) = ranks(2).run(
        run_out_of_memory, demo_arguments(demo, tmp_path, max_steps=1)
    )
    assert status == 2
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert "rank 0 has no GPU memory left: CUDA out of memory; " in error
    assert "check whether another process uses memory there; or it fits with " in error, "a tiny model on a large host"
    assert "error: rank 1 has no GPU memory left" in other_error, "rank 1 is not aborted while it waits for rank 0"


def run_out_of_memory(argv: list[str]) -> tuple[int, str, str]:
    """Run a job in which the first step of every rank runs out of memory."""
    from lomo_ds.train.loop import Trainer

    def fail(self: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    original, Trainer.run = Trainer.run, fail  # type: ignore[method-assign]
    try:
        return run_main(argv)
    finally:
        Trainer.run = original  # type: ignore[method-assign]
