"""Tests of plans with --attn_implementation."""

from pathlib import Path

import pytest

from lomo_ds.config.arguments import parse
from lomo_ds.planner import PlannedModel
from lomo_ds.planner.command import PlanArguments, plan_settings
from lomo_ds.planner.settings import Settings
from tests.models.test_attention import tiny_config

LAYERS, HEADS, LENGTH = 2, 4, 512


def kept_bytes(folder: Path, implementation: str) -> int:
    """Return the most bytes of activations in a plan of one row."""
    arguments, given = parse(
        PlanArguments,
        [
            f"--model_name_or_path={folder}", f"--attn_implementation={implementation}", f"--max_seq_length={LENGTH}",
            "--per_device_train_batch_size=1",
        ],
    )  # fmt: skip
    model = PlannedModel.load(str(folder))
    trace = model.trace(plan_settings(arguments, given, model, Settings), "module")
    return max(event.level for event in trace.events)


def test_eager_attention_keeps_its_weights(tmp_path: Path) -> None:
    """In fp32 after the softmax, and rounded to bf16."""
    tiny_config().save_pretrained(tmp_path)
    sdpa, eager = kept_bytes(tmp_path, "sdpa"), kept_bytes(tmp_path, "eager")
    assert eager - sdpa == pytest.approx(LAYERS * HEADS * LENGTH**2 * (4 + 2), rel=0.2)


def test_flash_attention_keeps_what_sdpa_keeps(tmp_path: Path) -> None:
    tiny_config().save_pretrained(tmp_path)
    assert kept_bytes(tmp_path, "flash_attention_2") == kept_bytes(tmp_path, "sdpa")
    config = tiny_config()
    config._attn_implementation = "flash_attention_3"  # as in a job on a GPU, which is planned before it starts
    PlannedModel(config).trace(Settings(sequence=LENGTH), "module")
