"""Plans of layered accumulation: memory as measured, time, and the number of micro-batches that they advise."""

import dataclasses

import pytest
from transformers import LlamaConfig

from benchmarks.lib.planned import planned_peak
from benchmarks.lib.workload import LARGE, SHAPES, TINY, Workload
from lomo_ds.errors import ConfigError
from lomo_ds.planner import Machine, PlannedModel, Settings, advise, format_plan, layered_trace, plan_as_dict, plan_run
from lomo_ds.planner.step_memory import CHECKPOINTS, IN_FLIGHT, STASH
from lomo_ds.planner.trace import trace_step
from lomo_ds.planner.trace_recorder import SUMS
from lomo_ds.update.buckets import MIN_BUCKET_NUMEL
from tests.planner.test_planner import GroupOf, measured_peak

LAYERS = 6
RUN = Settings(
    gpus=4, sequence=32, accumulation_steps=8, gradient_clipping=0.0, max_live_parameters=0, max_reuse_distance=0,
    prefetch_bucket_size=0, persistence_threshold=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> PlannedModel:
    return PlannedModel(
        LlamaConfig(
            vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
            max_position_embeddings=4096,
        )
    )  # fmt: skip


# memory


@pytest.mark.parametrize(
    ("method", "world_size", "work"),
    [
        ("immediate+layered", 1, Workload(TINY, 128, 2)),
        ("immediate+layered", 2, Workload(TINY, 128, 2, zero=LARGE)),
        ("immediate+layered", 2, Workload("40m", 64, 1, precision="bf16", checkpointing=True, zero=LARGE)),
        ("stash+layered+clip", 1, Workload(TINY, 128, 2, precision="bf16")),
        ("stash+layered+clip", 2, Workload(TINY, 64, 2, zero=LARGE)),
        ("two_pass+layered+clip", 2, Workload(TINY, 64, 2, checkpointing=True)),
        ("immediate+layered", 1, Workload(TINY, 512, 2, documents=3)),
    ],
)
def test_the_predicted_peak_equals_the_measured_one(
    ranks: GroupOf, method: str, world_size: int, work: Workload
) -> None:
    work = dataclasses.replace(work, accumulation=4)
    planned = planned_peak(method, work, world_size, "cpu")
    measured = max(ranks(world_size).run(measured_peak, method, work))
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("documents", [False, True])
def test_two_micro_batches_stand_for_all(documents: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SHAPES[TINY])
    run = Settings(sequence=32, batch=2, accumulation_steps=7, accumulation="layered", documents=documents)
    two = trace_step(config, run).by_layer()
    monkeypatch.setattr(layered_trace, "TRACED_MICRO_BATCHES", 7)
    seven = trace_step(config, run, every_layer=True).by_layer()
    assert two.flops == seven.flops
    assert two.forward_flops == seven.forward_flops
    assert two == seven
    for event, expected in zip(two.events, seven.events, strict=True):
        assert +two.sizes_of(event.live_at_peak) == seven.sizes_of(expected.live_at_peak)


def test_gradients_that_are_added_up_are_gradients_in_flight(model: PlannedModel) -> None:
    plan = plan_run(model, RUN.but(gpus=1), Machine(), by_name=True)
    layer = model.meta_model.model.layers[0]
    sums = plan.memory.sizes[IN_FLIGHT, SUMS]
    assert plan.memory.when.endswith("mlp.down_proj.weight arrives"), "the first gradient of a layer"
    assert sums == 2 * sum(parameter.numel() for parameter in layer.parameters())
    assert sums <= plan.memory.at_peak[IN_FLIGHT] <= sums + 2 * MIN_BUCKET_NUMEL
    assert sum(plan.memory.sizes.values()) == plan.gpu_bytes


def test_activation_offload_leaves_what_the_running_layer_reads(model: PlannedModel) -> None:
    run = RUN.but(sequence=4096, batch=4, gpus=2, accumulation_steps=16, gradient_checkpointing=True)
    kept, offloaded = (plan_run(model, run.but(activation_offload=offload), Machine()) for offload in (False, True))
    hidden = 2 * 256 * run.sequence * run.batch * run.accumulation_steps
    modules = LAYERS + 1  # and the final norm
    assert kept.memory.at_peak[CHECKPOINTS] == modules * hidden
    assert offloaded.memory.host[CHECKPOINTS] == pytest.approx(modules * hidden, rel=0.1)
    assert offloaded.memory.host[CHECKPOINTS] >= modules * hidden
    assert offloaded.memory.at_peak[CHECKPOINTS] <= 2 * hidden
    assert offloaded.gpu_bytes < kept.gpu_bytes - (LAYERS - 3) * hidden
    moved = (plan.time.link_bytes["link down"] for plan in (offloaded, kept))
    assert next(moved) - next(moved) == modules * hidden


def test_a_stash_for_clipping_keeps_the_gradients_dtype(model: PlannedModel) -> None:
    run = RUN.but(gradient_clipping=1.0, update_schedule="stash", stash_device="cpu")
    layered, stashed = (plan_run(model, run.but(accumulation=way), Machine()) for way in ("auto", "stash"))
    shards = model.numel // run.gpus
    assert 2 * shards <= layered.memory.host[STASH] < 3 * shards
    assert 4 * shards <= stashed.memory.host[STASH]


# resolution


def test_auto_is_layered_where_the_model_and_the_granularity_allow_it(model: PlannedModel) -> None:
    from transformers import GPT2Config

    plan = plan_run(model, RUN, Machine())
    assert str(plan.accumulation) == "layered (the model's layers allow it)"
    assert plan.choice.schedule == "immediate", "layered accumulation needs no stash"
    assert (plan.granularity, plan.tiled, plan.recomputes) == ("layer", True, True)
    assert "\naccumulation: layered, 8 micro-batches (the model's layers allow it)\n" in format_plan(plan, None)
    assert plan_as_dict(plan, None)["accumulation"]["layered"] is True

    by_module = plan_run(model, RUN.but(gather_granularity="module"), Machine())
    assert str(by_module.accumulation).startswith("stash (parameters are gathered by module")
    assert by_module.choice.schedule == "stash"
    assert not by_module.recomputes
    gpt2 = PlannedModel(GPT2Config(n_embd=32, n_layer=6, n_head=2, vocab_size=128, n_positions=64), "gpt2")
    assert "does not compute its loss like LlamaForCausalLM" in plan_run(gpt2, RUN, Machine()).accumulation.reason
    assert not plan_run(model, RUN.but(optimizer="adamw"), Machine()).accumulation.layered


def test_one_micro_batch_is_not_layered(model: PlannedModel) -> None:
    plain, layered = (
        plan_run(model, RUN.but(accumulation_steps=1, accumulation=way, gather_granularity="layer"), Machine())
        for way in ("stash", "layered")
    )
    assert plain.memory == layered.memory
    assert "accumulation:" not in format_plan(layered, None)


def test_what_the_engine_refuses_has_no_plan(model: PlannedModel) -> None:
    with pytest.raises(ConfigError, match="accumulation layered is not possible: parameters are gathered by module"):
        plan_run(model, RUN.but(accumulation="layered", gather_granularity="module"), Machine())
    with pytest.raises(ConfigError, match="immediate keeps no gradients"):
        plan_run(model, RUN.but(accumulation="stash", update_schedule="immediate"), Machine())


# time


def test_links_carry_a_steps_bytes_once_for_any_number_of_micro_batches(model: PlannedModel) -> None:
    for run in (RUN, RUN.but(offload_param="cpu"), RUN.but(gradient_clipping=1.0, stash_device="cpu")):
        runs = [run.but(accumulation_steps=steps, accumulation="layered") for steps in (2, 32)]
        two, many = (plan_run(model, run, Machine()).time for run in runs)
        assert two.link_bytes == many.link_bytes
        assert many.link_bytes["between GPUs"] == pytest.approx(3 * 2 * model.numel * 3 / 4, rel=0.05)
        flops_of_two, flops_of_many = (model.trace(run, "layer").flops for run in runs)
        assert flops_of_many == 16 * flops_of_two
    stashed = plan_run(model, RUN.but(accumulation="stash"), Machine()).time
    assert stashed.link_bytes["between GPUs"] > 7 * many.link_bytes["between GPUs"]


def test_auto_accumulates_in_the_stash_where_only_that_fits(model: PlannedModel) -> None:
    run = RUN.but(sequence=1024, accumulation_steps=64)
    layered = plan_run(model, run.but(accumulation="layered"), Machine())
    stashed = plan_run(model, run.but(accumulation="stash"), Machine())
    assert stashed.gpu_bytes < layered.gpu_bytes
    small = Machine(gpu_memory=(stashed.gpu_bytes + layered.gpu_bytes) // 2)
    plan = plan_run(model, run, small)
    assert plan.fits
    assert plan.gpu_bytes == stashed.gpu_bytes
    assert str(plan.accumulation).startswith("stash (layered accumulation would need ")
    assert plan_run(model, run, Machine()).accumulation.layered
    advice = advise(plan_run(model, run.but(accumulation="layered"), small), model)
    assert advice is not None
    assert advice.plan.fits


def test_auto_gathers_by_module_where_only_that_fits(model: PlannedModel) -> None:
    by_layer, by_module = (
        plan_run(model, RUN.but(accumulation_steps=1, gather_granularity=granularity), Machine())
        for granularity in ("layer", "module")
    )
    assert by_module.gpu_bytes < by_layer.gpu_bytes
    small = Machine(gpu_memory=(by_module.gpu_bytes + by_layer.gpu_bytes) // 2)
    plan = plan_run(model, RUN.but(accumulation_steps=1), small)
    assert (plan.granularity, plan.fits) == ("module", True)
    assert plan_run(model, RUN.but(accumulation_steps=1), Machine()).granularity == "layer"
