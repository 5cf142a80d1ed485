"""Trainer and SFTTrainer with one line more: they train as plain SGD does, save, resume, evaluate and generate."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lomo_ds
from lomo_ds.errors import ConfigError
from tests.ranks import Ranks
from tests.trainers import (
    COMMON,
    LEARNING_RATE,
    ds_config,
    instruction_rows,
    largest_difference,
    logged,
    lomo_installed,
    new_process_state,
    stories_model,
    stories_tokenizer,
    tokenized_rows,
    train_plainly,
)

GroupOf = Callable[..., Ranks]
STEPS = 4
BATCH = 8  # rows of a step, on all ranks and in all micro-batches
ROWS = STEPS * BATCH - 4  # the last step of the epoch has one micro-batch instead of two
ACCUMULATION = 2
TOLERANCE = 1e-5
PROMPT = "Once upon a time"
# the learning rates of the steps; DeepSpeed's schedulers take their first value twice
COSINE = [LEARNING_RATE * factor for factor in (0.0, 1.0, 0.75, 0.25)]
DECAY = [LEARNING_RATE * factor for factor in (0.0, 0.0, 0.5, 1.0)]


def batch_sizes(world_size: int) -> dict[str, int]:
    return {
        "per_device_train_batch_size": BATCH // ACCUMULATION // world_size,
        "gradient_accumulation_steps": ACCUMULATION,
        "per_device_eval_batch_size": 1,
    }


def generate(model: PreTrainedModel, folder: str, rank: int, **arguments: Any) -> list[int]:
    """Continue a prompt greedily; another rank writes more."""
    prompt = stories_tokenizer(folder)(PROMPT, return_tensors="pt").input_ids
    return model.generate(prompt, max_new_tokens=4 + 5 * rank, do_sample=False, pad_token_id=0, **arguments)[0].tolist()


class GenerateOnEvaluate(TrainerCallback):
    """Generates during evaluation, as scripts do to show samples."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.texts: list[list[int]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
        self.texts.append(generate(model, self.folder, args.process_index, synced_gpus=True))


def run_trainer(
    folder: str, output_dir: str, world_size: int, scheduler: str, checkpoint: str | None = None
) -> dict[str, Any]:
    with lomo_installed():
        model = stories_model(folder)
        params = {"warmup_type": "linear", "warmup_num_steps": 2, "warmup_min_lr": "auto", "warmup_max_lr": "auto"}
        by_deepspeed = {"type": "WarmupDecayLR", "params": params | {"total_num_steps": "auto"}}
        arguments = {
            "trainer": {"lr_scheduler_type": "cosine", "warmup_steps": 1, "deepspeed": ds_config()},
            "deepspeed": {"warmup_steps": 2, "deepspeed": ds_config(scheduler=by_deepspeed)},
        }[scheduler]
        args = TrainingArguments(
            output_dir,
            **COMMON | batch_sizes(world_size) | arguments | {"save_strategy": "steps", "save_steps": 2},
            eval_strategy="steps",
            eval_steps=2,
            eval_on_start=True,
        )
        rows, tokenizer = tokenized_rows(folder, ROWS), stories_tokenizer(folder)
        samples = GenerateOnEvaluate(folder)
        trainer = Trainer(
            model,
            args,
            DataCollatorForSeq2Seq(tokenizer),
            train_dataset=rows,
            eval_dataset=rows.select(range(6)),
            processing_class=tokenizer,
            callbacks=[samples],
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(f"{output_dir}/final")
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        engine = type(trainer.model_wrapped).__name__
        return {"engine": engine, "logged": logged(trainer), "eval": losses, "texts": samples.texts}


@pytest.fixture
def reference(assets: Path, one_thread: None) -> Callable[[list[float], int], dict[str, Any]]:
    """Train plainly with these learning rates; evaluate and generate at the start and after every second step.

    Trainer's evaluation averages over the tokens of the rows that all ranks have at a time, and then over these means.
    """

    def train(learning_rates: list[float], world_size: int) -> dict[str, Any]:
        folder = str(assets)
        model, rows, tokenizer = stories_model(folder), tokenized_rows(folder, ROWS), stories_tokenizer(folder)
        collate = DataCollatorForSeq2Seq(tokenizer)
        records: list[tuple[float, float]] = []
        losses, texts = [], []
        for done in (0, 2, 4):
            if done:
                part = rows.select(range((done - 2) * BATCH, min(done * BATCH, ROWS)))
                records += train_plainly(model, part, collate, BATCH, learning_rates[done - 2 : done])
            model.eval()
            with torch.no_grad():
                batches = [collate([rows[i + j] for j in range(world_size)]) for i in range(0, 6, world_size)]
                losses.append(sum(float(model(**batch).loss) for batch in batches) / len(batches))
                texts.append([generate(model, folder, rank) for rank in (0, 1)])
        return {"model": model, "logged": records, "eval": losses, "texts": texts}

    return train


def weight_difference(saved: str, expected: PreTrainedModel) -> float:
    """Return the largest difference of a weight in a saved folder to ``expected``."""
    model = AutoModelForCausalLM.from_pretrained(saved)
    weights = dict(expected.named_parameters())
    return max(float((p - weights[name]).detach().abs().max()) for name, p in model.named_parameters())


@pytest.mark.parametrize(("scheduler", "learning_rates"), [("trainer", COSINE), ("deepspeed", DECAY)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer_takes_the_steps_of_plain_sgd(
    ranks: GroupOf,
    assets: Path,
    tmp_path: Path,
    reference: Callable[[list[float], int], dict[str, Any]],
    world_size: int,
    scheduler: str,
    learning_rates: list[float],
) -> None:
    """Rows differ much in their numbers of labels, and the last step has fewer rows: a mean of means would differ."""
    expected = reference(learning_rates, world_size)
    results = ranks(world_size).run(run_trainer, str(assets), str(tmp_path), world_size, scheduler)
    for rank, result in enumerate(results):
        assert result["engine"] == "LomoEngine"
        assert largest_difference(result["logged"], expected["logged"]) < TOLERANCE
        assert result["eval"] == pytest.approx(expected["eval"], abs=TOLERANCE)
        assert result["texts"] == [texts[rank] for texts in expected["texts"]]
    assert weight_difference(f"{tmp_path}/final", expected["model"]) < TOLERANCE
    assert not list(Path(tmp_path, "final").glob("global_step*")), "a folder of a model, and of nothing else"


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(1, 2), (2, 1)])
def test_another_number_of_ranks_resumes(
    ranks: GroupOf,
    assets: Path,
    tmp_path: Path,
    reference: Callable[[list[float], int], dict[str, Any]],
    saved_on: int,
    resumed_on: int,
) -> None:
    ranks(saved_on).run(run_trainer, str(assets), str(tmp_path / "first"), saved_on, "trainer")
    checkpoint = str(tmp_path / "first" / "checkpoint-2")
    ranks(resumed_on).run(run_trainer, str(assets), str(tmp_path / "second"), resumed_on, "trainer", checkpoint)
    expected = reference(COSINE, 1)["model"]
    assert weight_difference(f"{tmp_path}/second/final", expected) < TOLERANCE


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


# checkpoints


def shuffled_trainer(folder: str, output_dir: str, world_size: int, **arguments: Any) -> Trainer:
    """Build a trainer with random numbers in every step: in the order of the rows and in dropout."""
    model = stories_model(folder, attention_dropout=0.2)
    chosen = {"train_sampling_strategy": "random", "lr_scheduler_type": "cosine", "deepspeed": ds_config()}
    args = TrainingArguments(output_dir, **COMMON | batch_sizes(world_size) | chosen | arguments)
    rows = tokenized_rows(folder, STEPS * BATCH)
    collate = DataCollatorForSeq2Seq(stories_tokenizer(folder))
    return Trainer(model, args, collate, train_dataset=rows, eval_dataset=rows.select(range(4)))


def run_and_resume(folder: str, output_dir: str, world_size: int, bf16: bool) -> list[tuple[float, float]]:
    """Train with a checkpoint after two steps, and again from that checkpoint; both save their model."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    with lomo_installed():
        whole = shuffled_trainer(folder, f"{output_dir}/whole", world_size, bf16=bf16, **saving)
        whole.train()
        whole.save_model(f"{output_dir}/expected")
    with lomo_installed():
        torch.manual_seed(99)
        resumed = shuffled_trainer(folder, f"{output_dir}/resumed", world_size, bf16=bf16)
        resumed.train(resume_from_checkpoint=f"{output_dir}/whole/checkpoint-2")
        resumed.save_model(f"{output_dir}/resumed")
    assert logged(resumed) == logged(whole)
    return logged(resumed)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_resuming_is_bit_exact(ranks: GroupOf, assets: Path, tmp_path: Path, world_size: int, bf16: bool) -> None:
    """In bf16 weights are rounded stochastically, from where the noise of the first run ended."""
    records = ranks(world_size).run(run_and_resume, str(assets), str(tmp_path), world_size, bf16)[0]
    assert len(records) == STEPS
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "resumed"))
    assert {tensor.dtype for tensor in whole.values()} == {torch.bfloat16 if bf16 else torch.float32}
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def run_with_best_model(folder: str, output_dir: str, world_size: int) -> dict[str, Any]:
    """Choose the model with the largest loss, which is the one after the first step."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    with lomo_installed():
        trainer = shuffled_trainer(folder, output_dir, world_size, save_total_limit=2, **best, **saving)
        trainer.train()
        trainer.save_model(f"{output_dir}/best")
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        best_loss = trainer.evaluate()["eval_loss"]
        return {"best": trainer.state.best_model_checkpoint, "loss": best_loss, "losses": losses}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_best_model_is_loaded_at_the_end_and_old_checkpoints_are_deleted(
    ranks: GroupOf, assets: Path, tmp_path: Path, world_size: int
) -> None:
    result = ranks(world_size).run(run_with_best_model, str(assets), str(tmp_path), world_size)[0]
    assert result["best"] == f"{tmp_path}/checkpoint-1"
    assert result["loss"] == result["losses"][0] > max(result["losses"][1:])
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-4"]
    best, loaded = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-1", "best"))
    assert all(torch.equal(best[name], loaded[name]) for name in best)


# refusals


def refusal_of_trainer(folder: str, output_dir: str, params: dict[str, Any], arguments: dict[str, Any]) -> str:
    """Return the error of a trainer with these parameters of LOMO and these arguments."""
    config = ds_config(optimizer={"type": "LOMO", "params": {"lr": "auto", **params}})
    with lomo_installed():
        trainer = shuffled_trainer(folder, output_dir, 1, deepspeed=config, **arguments)
        with pytest.raises(ConfigError) as refusal:
            trainer.train()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("params", "arguments", "reason"),
    [
        (
            {"update_schedule": "two_pass"},
            {"gradient_accumulation_steps": 1},
            "update_schedule two_pass must run every batch forward and backward twice",
        ),
        (
            {"update_schedule": "immediate"},
            {"max_grad_norm": 0.0},
            "update_schedule immediate cannot accumulate gradients",
        ),
        (
            {"update_schedule": "immediate"},
            {"gradient_accumulation_steps": 1},
            "update_schedule immediate cannot honour gradient_clipping 1.0",
        ),
        ({"learning_rte": 0.1}, {}, "LOMO has no parameter 'learning_rte'"),
        ({}, {"optim": "lomo"}, "leave optim out of TrainingArguments"),
        (
            {},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            "ReduceLROnPlateau needs a metric, which train_batch and transformers' Trainer do not provide",
        ),
        ({}, {"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "GreedyLR needs a metric"),
    ],
)
def test_what_cannot_be_is_refused_with_a_reason(
    ranks: GroupOf, assets: Path, tmp_path: Path, params: dict[str, Any], arguments: dict[str, Any], reason: str
) -> None:
    assert reason in ranks(1).run(refusal_of_trainer, str(assets), str(tmp_path), params, arguments)[0]


def test_an_optimizer_of_the_program_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with lomo_ds.install(), pytest.raises(ConfigError, match=r"takes no optimizer, got SGD; name the optimizer in the"):
        deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config())


# accelerate


def run_accelerate(folder: str, output_dir: str, world_size: int) -> dict[str, Any]:
    """Train by a loop of one's own, save, and load again."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin, DummyOptim

    with lomo_installed():
        PartialState(cpu=True)
        plugin = DeepSpeedPlugin(hf_ds_config=ds_config(gradient_accumulation_steps=ACCUMULATION))
        accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATION)
        collate = DataCollatorForSeq2Seq(stories_tokenizer(folder))
        batch_size = BATCH // ACCUMULATION // world_size
        loader: Any = torch.utils.data.DataLoader(
            tokenized_rows(folder, STEPS * BATCH), batch_size=batch_size, collate_fn=collate
        )
        model: Any = stories_model(folder)
        model, optimizer, loader = accelerator.prepare(model, DummyOptim(model.parameters(), lr=LEARNING_RATE), loader)
        norms = []
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    norms.append(model.get_global_grad_norm())
                optimizer.step()
                optimizer.zero_grad()
        accelerator.save_model(model, f"{output_dir}/model")
        accelerator.save_state(f"{output_dir}/state")
        model.global_steps = 0
        accelerator.load_state(f"{output_dir}/state")
        return {"norms": norms, "steps": model.global_steps}


def train_by_means_of_means(folder: str, batch_size: int) -> tuple[list[float], PreTrainedModel]:
    """Train plainly on the mean of the losses of ``batch_size`` rows at a time, and return the gradient norms."""
    model, rows = stories_model(folder).train(), tokenized_rows(folder, STEPS * BATCH)
    collate = DataCollatorForSeq2Seq(stories_tokenizer(folder))
    norms = []
    for first in range(0, STEPS * BATCH, BATCH):
        for start in range(first, first + BATCH, batch_size):
            batch = collate([rows[index] for index in range(start, start + batch_size)])
            (model(**batch, use_cache=False).loss * batch_size / BATCH).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()
        model.zero_grad()
    return norms, model


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_with_accelerate_averages_as_deepspeed_does(
    ranks: GroupOf, assets: Path, tmp_path: Path, one_thread: None, world_size: int
) -> None:
    results = ranks(world_size).run(run_accelerate, str(assets), str(tmp_path), world_size)
    norms, model = train_by_means_of_means(str(assets), BATCH // ACCUMULATION // world_size)
    for result in results:
        assert result["norms"] == pytest.approx(norms, rel=TOLERANCE)
        assert result["steps"] == STEPS
    assert (tmp_path / "state" / "pytorch_model" / "state.json").is_file()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    weights = dict(model.named_parameters())
    assert max(float((weights[name] - saved[name]).detach().abs().max()) for name in weights) < TOLERANCE


# the page


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
