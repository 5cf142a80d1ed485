"""Plans of packed documents: the mask that keeps them apart is counted, and avoided where that makes a plan fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from lomo_ds.config.arguments import parse
from lomo_ds.planner import Machine, PlannedModel, Settings, advise, command_line, plan_run
from lomo_ds.planner.command import PlanArguments, plan_settings
from tests.data.datasets import write_jsonl
from tests.launching import demo_arguments
from tests.planner.test_planner import run_and_read_log
from tests.ranks import Ranks

GroupOf = Callable[..., Ranks]
LAYERS, LENGTH = 5, 1024


@pytest.fixture
def model() -> PlannedModel:
    return PlannedModel(
        LlamaConfig(
            vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "masked"),
    [
        ([], False),
        (["--packing"], True),
        (["--packing=false"], False),
        (["--packing_strategy=bfd_split", "--attn_implementation=eager"], True),
        (["--packing", "--packing_strategy=wrapped"], False),
        (["--packing", "--attn_implementation=flash_attention_3"], False),
    ],
)
def test_the_arguments_say_whether_there_is_a_mask(argv: list[str], masked: bool, model: PlannedModel) -> None:
    length = f"--max_seq_length={LENGTH}"
    arguments, given = parse(PlanArguments, ["--model_name_or_path=tiny", "--tiled_logits=false", length, *argv])
    assert plan_settings(arguments, given, model, Settings).masked is masked


def test_the_mask_is_kept_once_and_its_conversion_in_every_layer(model: PlannedModel) -> None:
    run = Settings(sequence=LENGTH)

    def added_bytes(run: Settings) -> int:
        with_mask, without = (model.trace(run.but(documents=documents), "module") for documents in (True, False))
        assert with_mask.flops > without.flops, "a kernel skips nothing"
        return max(e.level for e in with_mask.events) - max(e.level for e in without.events)

    assert added_bytes(run) == pytest.approx((1 + LAYERS * 2) * LENGTH**2, rel=0.02)
    assert added_bytes(run.but(gradient_checkpointing=True)) == pytest.approx((1 + 2) * LENGTH**2, rel=0.02)


def test_flash_attention_is_advised_where_the_mask_alone_does_not_fit(model: PlannedModel) -> None:
    run = Settings(sequence=LENGTH, documents=True, gradient_clipping=0.0)
    needed, least = (plan_run(model, settings, Machine()).gpu_bytes for settings in (run, run.but(documents=False)))
    machine = Machine((needed + least) // 2)
    advice = advise(plan_run(model, run, machine), model)
    assert advice is not None
    assert advice.changes == ("--attn_implementation flash_attention_2",)
    assert "--attn_implementation flash_attention_2" in command_line(advice.plan)
    for other in (run.but(attention="eager"), run.but(precision="fp32")):
        advice = advise(plan_run(model, other, machine), model)
        assert advice is None or not any("flash" in change for change in advice.changes)


def test_a_job_plans_for_its_documents(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    rows = [{"text": line} for line in (demo / "train.txt").read_text().splitlines()[:20]]
    file = write_jsonl(tmp_path / "a.jsonl", rows)

    def planned_mib(strategy: str) -> float:
        more: dict[str, Any] = {
            "train_file": file,
            "per_device_train_batch_size": 8,
            "packing_strategy": strategy,
            "max_steps": 1,
        }
        arguments = demo_arguments(demo, tmp_path / strategy, max_seq_length=128, **more)
        (line,) = ranks(1).run(run_and_read_log, arguments)[0]
        return float(line.split()[1])

    assert planned_mib("bfd") > planned_mib("wrapped") + 8 * 128**2 * 4 / 2**20, "of eight rows in fp32"
