"""The planner advises the smallest step that makes arithmetic, rather than a link, the bottleneck."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import GPT2Config, LlamaConfig

from lomo_ds.planner import Machine, PlannedModel, Settings, find_bigger_step, format_plan, plan_run, settings_of
from lomo_ds.planner.command import main
from tests.planner.test_planner import config_as_launched

RUN = Settings(gpus=4, sequence=64, gradient_clipping=0.0)
FAST_HOST = Machine(launch_seconds=1e-9, flops=1e13)  # a small model has kernels shorter than a launch
SLOW_LINK = dataclasses.replace(FAST_HOST, pcie=64e9, gpu_link=1e9)


@pytest.fixture(scope="module")
def model() -> PlannedModel:
    return PlannedModel(
        LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
            max_position_embeddings=4096,
        ),
        "small",
    )  # fmt: skip


def test_the_smallest_step_that_arithmetic_bounds_is_advised(model: PlannedModel) -> None:
    plan = plan_run(model, RUN, SLOW_LINK)
    bigger = find_bigger_step(plan, model)
    assert bigger is not None
    steps = bigger.plan.settings.accumulation_steps
    assert steps > 2
    assert bigger.plan.time.bottleneck_name == "arithmetic"
    half = plan_run(model, RUN.but(accumulation_steps=steps // 2), SLOW_LINK)
    assert half.time.by_kind["compute"] < 0.9 * half.time.total
    assert bigger.factor == bigger.plan.tokens_per_second / plan.tokens_per_second > 1.5
    assert bigger.changes == (f"--gradient_accumulation_steps {steps}",)
    lines = format_plan(plan, None, bigger).splitlines()
    assert lines[-3].startswith(f"bound by the link between GPUs: --gradient_accumulation_steps {steps} makes it ")
    assert "times as fast: " in lines[-3]
    assert f"--gradient_accumulation_steps {steps} " in lines[-2]
    assert find_bigger_step(bigger.plan, model) is None, "arithmetic bounds it already"


def test_a_step_that_is_partly_bound_by_a_link_is_improved(model: PlannedModel) -> None:
    run = RUN.but(gpus=1, offload_param="cpu", sequence=512, gather_granularity="layer", gradient_checkpointing=True)
    plan = plan_run(model, run, dataclasses.replace(FAST_HOST, pcie=2.8e9))
    assert plan.time.bottleneck_name == "arithmetic", "of backward, while forward waits for the link"
    assert str(find_bigger_step(plan, model)).startswith("partly bound by the link: --gradient_accumulation_steps 8 ")


def test_inputs_of_layers_go_to_host_memory_where_the_step_does_not_fit_otherwise(model: PlannedModel) -> None:
    run = RUN.but(sequence=4096, batch=8, gradient_checkpointing=True)
    machine = dataclasses.replace(FAST_HOST, pcie=1e12, gpu_link=1e8, flops=4e14)
    ample = find_bigger_step(plan_run(model, run, machine), model)
    assert ample is not None
    settings = ample.plan.settings
    offloaded = plan_run(model, settings.but(activation_offload=True), machine)
    tight = dataclasses.replace(machine, gpu_memory=(ample.plan.gpu_bytes + offloaded.gpu_bytes) // 2)
    assert not plan_run(model, settings.but(accumulation="layered"), tight).fits
    bigger = find_bigger_step(plan_run(model, run, tight), model)
    assert bigger is not None
    assert bigger.plan.fits
    assert bigger.changes == (*ample.changes, "--activation_offload")
    assert "and --activation_offload make it" in str(bigger)


def test_no_step_is_advised_where_none_helps(model: PlannedModel) -> None:
    gpt2 = PlannedModel(GPT2Config(n_embd=32, n_layer=6, n_head=2, vocab_size=128, n_positions=64), "gpt2")
    for planned, run in (
        (gpt2, RUN.but(sequence=32)),  # has no layers that accumulate
        (model, RUN.but(gather_granularity="module")),
        (model, RUN.but(accumulation="stash")),
        (model, RUN.but(optimizer="adamw")),
        (model, RUN.but(gpus=1)),  # nothing moves
    ):
        assert find_bigger_step(plan_run(planned, run, SLOW_LINK), planned) is None
    small = Machine(gpu_memory=2**20)
    assert find_bigger_step(plan_run(model, RUN, small), model) is None, "what does not fit is not made faster"


def test_the_suggestion_launches_the_bigger_step(model: PlannedModel, tmp_path: Path) -> None:
    bigger = find_bigger_step(plan_run(model, RUN.but(accumulation="layered"), SLOW_LINK), model)
    assert bigger is not None
    ds_config = config_as_launched(bigger.plan, tmp_path)
    assert ds_config["optimizer"]["params"]["accumulation"] == "layered"
    read = settings_of(ds_config, gpus=4, sequence=64)
    assert read == bigger.plan.settings


def test_a_plan_of_the_command_line_has_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "suggested.json"
    command = [
        "--model_name_or_path=40m", "--num_gpus=2", "--max_seq_length=128", "--per_device_train_batch_size=1",
        "--max_grad_norm=0", "--pcie=2GB/s", "--launch_microseconds=1", f"--suggest={file}",
    ]  # fmt: skip
    main([*command, "--json"])
    bigger = json.loads(capsys.readouterr().out)["bigger_step"]
    steps = bigger["plan"]["settings"]["accumulation_steps"]
    assert bigger["changes"] == [f"--gradient_accumulation_steps {steps}"]
    assert bigger["plan"]["bound_by"] == "compute"
    assert bigger["plan"]["bigger_step"] is None
    main([*command, f"--deepspeed={file}", f"--gradient_accumulation_steps={steps}"])
    output = capsys.readouterr().out
    assert f"accumulation: layered, {steps} micro-batches" in output
    assert "times as fast" not in output
