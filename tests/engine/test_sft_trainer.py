"""TRL's SFTTrainer with one line more: it takes the steps of plain SGD, and so does the script of the page."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks
from tests.trainers import (
    BATCH,
    COMMON,
    LEARNING_RATE,
    STEPS,
    TOLERANCE,
    batch_sizes,
    ds_config,
    instruction_rows,
    largest_difference,
    logged,
    lomo_installed,
    new_process_state,
    stories_model,
    stories_tokenizer,
    train_plainly,
    weight_difference,
)

GroupOf = Callable[..., Ranks]


def run_sft(folder: str, output_dir: str, world_size: int, schedule: str) -> dict[str, Any]:
    from trl import SFTConfig, SFTTrainer

    immediate = {
        "per_device_train_batch_size": BATCH // world_size,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": LEARNING_RATE / 10,  # gradients are not clipped
    }
    with lomo_installed():
        args = SFTConfig(
            output_dir,
            **COMMON
            | batch_sizes(world_size)
            | (immediate if schedule == "immediate" else {})
            | {"save_strategy": "steps", "save_steps": STEPS, "save_only_model": True, "deepspeed": ds_config()},
            bf16=False,
            packing=True,
            max_length=64,
        )
        model = stories_model(folder)  # after the arguments, so that each rank loads only its shards
        is_partitioned = all(parameter.numel() == 0 for parameter in model.parameters())
        trainer = SFTTrainer(
            model, args, train_dataset=instruction_rows(folder, 48), processing_class=stories_tokenizer(folder)
        )
        trainer.train()
        packed = trainer.train_dataset.select(range(STEPS * BATCH)).to_list()
        chosen = trainer.model_wrapped.optimizer.choice.schedule
        return {"logged": logged(trainer), "packed": packed, "partitioned": is_partitioned, "schedule": chosen}


@pytest.mark.parametrize("schedule", ["immediate", "stash"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_sft_trainer_takes_the_steps_of_plain_sgd(
    ranks: GroupOf, assets: Path, tmp_path: Path, one_thread: None, world_size: int, schedule: str
) -> None:
    """Rows are packed, layers recomputed in backward, and ``zero.Init`` has partitioned the model."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    results = ranks(world_size).run(run_sft, str(assets), str(tmp_path), world_size, schedule)
    model = stories_model(str(assets))
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    max_norm = math.inf if schedule == "immediate" else 1.0
    lr = LEARNING_RATE / 10 if schedule == "immediate" else LEARNING_RATE
    expected = train_plainly(model, results[0]["packed"], collate, BATCH, [lr] * STEPS, max_norm)
    for result in results:
        assert result["partitioned"]
        assert result["schedule"] == schedule
        assert largest_difference(result["logged"], expected) < TOLERANCE
    assert weight_difference(f"{tmp_path}/checkpoint-4", model) < TOLERANCE
    assert not list(tmp_path.rglob("global_step*")), "save_only_model"


def run_page(code: str) -> tuple[str, str, list[float]]:
    """Run a script, on the CPU and in fp32, in a folder that has its files."""
    import trl

    with new_process_state(), pytest.MonkeyPatch.context() as patch:
        here = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
        patch.setattr(trl, "SFTConfig", partial(trl.SFTConfig, **here))
        script: dict[str, Any] = {}
        exec(compile(code, "docs/trainers.md", "exec"), script)
        trainer = script["trainer"]
        engine = trainer.model_wrapped
        return type(engine).__name__, engine.optimizer.choice.schedule, [loss for loss, _ in logged(trainer)]


def in_folder(folder: str, code: str) -> tuple[str, str, list[float]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_page(code)


def test_the_script_of_the_page_trains_and_saves_a_model(ranks: GroupOf, assets: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"^```(python|json)\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    (tmp_path / "ds_config.json").write_text(blocks["json"], encoding="utf-8")
    instruction_rows(str(assets), 48).to_json(tmp_path / "instructions.json", lines=False)
    small = {"/models/llama-7b": f"{assets}/stories260K", "max_length=1024": "max_length=64"}
    code = re.sub("|".join(small), lambda match: small[match[0]], blocks["python"])
    results = ranks(2).run(in_folder, str(tmp_path), code)
    for engine, schedule, losses in results:
        assert (engine, schedule) == ("LomoEngine", "immediate")
        assert losses[-1] < losses[0]
    original = stories_model(str(assets))
    assert weight_difference(f"{tmp_path}/out", original) > 1e-3
