"""Compares sums of micro-batch gradients in bf16 with sums in fp32, by the held-out loss after the same steps.

    python benchmarks/sums.py --model_name_or_path MODEL --train_file FILE --validation_file FILE

Layered accumulation adds up the gradients of a layer over the micro-batches of a step. Both runs of a pair train the
same bf16 weights on the same rows, with the same seed of stochastic rounding. In one of them every addition is rounded
to bf16, in the other only the finished sum is. Pairs differ in the seed, which the order of rows also depends on, so
the spread over seeds shows how much of a difference is chance. The errors of such sums are measured too, with the
model's first weights: the norm of the difference to the sum in fp32, as a part of its norm. It runs on one CPU rank.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import options, result_files
from benchmarks.lib.workers import RankState, Workers
from benchmarks.lib.workload import DTYPES
from lomo_ds.update.hooks import BackwardHooks

SUMS = ("bf16", "fp32")  # data types of the sums
COLORS = {"bf16": "#e08e45", "fp32": "#1b7f79"}
EVALUATED = 1500  # rows of the validation file, at most
EVALUATED_AT_ONCE = 100
SUMMANDS = (4, 16, 64, 256)  # numbers of gradients whose sums' errors are measured

Run = dict[str, Any]


@dataclass(frozen=True)
class PairedJob:
    """The settings that the two runs of a pair have in common.

    Attributes:
        model, train_file, validation_file: a Hugging Face folder and two texts.
        tokens: tokens of a row; a micro-batch is one row.
        steps: number of steps.
        learning_rate: of LOMO without clipping.
    """

    model: str
    train_file: str
    validation_file: str
    tokens: int
    steps: int
    learning_rate: float

    def ds_config(self, accumulation: int, seed: int) -> dict[str, Any]:
        """Return the DeepSpeed config."""
        params = {
            "lr": self.learning_rate,
            "update_schedule": "immediate",
            "accumulation": "layered",
            "rounding": "stochastic",
            "seed": seed,
        }
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulation,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "LOMO", "params": params},
        }


class SummingHooks(BackwardHooks):
    """Adds up the gradients of micro-batches in ``sum_dtype``, and rounds their sum to the parameter's precision."""

    sum_dtype: torch.dtype

    def _sum_dtype(self, dtype: torch.dtype, count: int) -> torch.dtype:
        return self.sum_dtype


def train(state: RankState, job: PairedJob, accumulation: int, seed: int, sums: str) -> Run:
    """Train a model with one data type of the sums, on a rank, and return its held-out losses."""
    from transformers import AutoModelForCausalLM

    import lomo_ds

    rows, held_out = rows_of(job.model, job.train_file, job.tokens), rows_of(job.model, job.validation_file, job.tokens)
    held_out = held_out[:EVALUATED]
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).train()
    before = held_out_loss(job.model, model.state_dict(), held_out)
    hooks = type("Hooks", (SummingHooks,), {"sum_dtype": DTYPES[sums]})
    with mock.patch("lomo_ds.engine.build.BackwardHooks", hooks):
        engine = lomo_ds.initialize(model=model, config=job.ds_config(accumulation, seed))[0]
    order = torch.Generator().manual_seed(seed)
    for _ in range(job.steps):
        chosen = torch.randint(len(rows), (accumulation, 1), generator=order)
        engine.train_batch([{"input_ids": rows[index], "labels": rows[index]} for index in chosen])
    loss = held_out_loss(job.model, engine.module.state_dict(), held_out)
    engine.destroy()
    return {"accumulation": accumulation, "seed": seed, "sums": sums, "loss_before": before, "loss": loss}


def sum_errors(state: RankState, job: PairedJob) -> dict[str, dict[str, float]]:
    """Return the relative error of the sum of some bf16 gradients, on a rank, by their number.

    Returns:
        For each number the error with every addition rounded to bf16, and with only the fp32 sum rounded.
    """
    from transformers import AutoModelForCausalLM

    rows = rows_of(job.model, job.train_file, job.tokens)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16).train()
    rounded = torch.zeros(sum(parameter.numel() for parameter in model.parameters()), dtype=torch.bfloat16)
    exact = rounded.float()
    errors = {}
    for number in range(1, max(SUMMANDS) + 1):
        row = rows[number % len(rows)][None]
        loss = model(input_ids=row, labels=row, use_cache=False).loss
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
        rounded += gradient
        exact += gradient
        if number in SUMMANDS:
            each, once = (
                float((summed.float() - exact).norm() / exact.norm()) for summed in (rounded, exact.bfloat16())
            )
            errors[str(number)] = {"each": each, "once": once}
    return errors


def rows_of(model: str, file: str, tokens: int) -> Tensor:
    """Return the text of a file as rows of ``tokens`` tokens."""
    from transformers import AutoTokenizer

    text = Path(file).read_text(encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])
    return ids[: len(ids) // tokens * tokens].view(-1, tokens)


@torch.no_grad()
def held_out_loss(model: str, weights: dict[str, Tensor], rows: Tensor) -> float:
    """Return the mean loss of ``weights`` on ``rows``, computed in fp32, in nats per token."""
    from transformers import AutoModelForCausalLM

    evaluated = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    evaluated.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    parts = rows.split(EVALUATED_AT_ONCE)
    return sum(float(evaluated(input_ids=part, labels=part).loss) * len(part) for part in parts) / len(rows)


def differences(runs: list[Run], accumulation: int) -> dict[int, float]:
    """Return the loss with sums in bf16 minus that with sums in fp32, by seed, of the pairs that are complete."""
    losses = {(run["seed"], run["sums"]): run["loss"] for run in runs if run["accumulation"] == accumulation}
    seeds = dict.fromkeys(seed for seed, _ in losses)
    return {
        seed: losses[seed, "bf16"] - losses[seed, "fp32"]
        for seed in seeds
        if all((seed, sums) in losses for sums in SUMS)
    }


def describe(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    runs, job = results["runs"], results["job"]
    rows = []
    for accumulation in dict.fromkeys(run["accumulation"] for run in runs):
        of_seeds = differences(runs, accumulation)
        for run in runs:
            if run["accumulation"] == accumulation:
                difference = (
                    f"{of_seeds[run['seed']]:+.4f}" if run["sums"] == "bf16" and run["seed"] in of_seeds else ""
                )
                rows.append([str(accumulation), str(run["seed"]), run["sums"], f"{run['loss']:.4f}", difference])
    header = ["micro-batches", "seed", "sums in", "held-out loss", "bf16 minus fp32"]
    return (
        "# Sums of micro-batch gradients in bf16 and in fp32\n\n"
        f"{job['steps']} steps of LOMO with learning rate {job['learning_rate']:g}, micro-batches of one row of "
        f"{job['tokens']} tokens, bf16 weights with stochastic rounding; {runs[0]['loss_before']:.3f} nats before.\n\n"
        + "".join(f"- {finding}\n" for finding in [*findings(runs), *errors_in_words(results["errors"])])
        + "\n"
        + result_files.table(header, rows)
    )


def findings(runs: list[Run]) -> list[str]:
    """Describe the mean difference for each number of micro-batches, with its standard error."""
    lines = []
    for accumulation in dict.fromkeys(run["accumulation"] for run in runs):
        values = list(differences(runs, accumulation).values())
        if not values:
            continue
        error = f" (standard error {statistics.stdev(values) / len(values) ** 0.5:.4f})" if len(values) > 1 else ""
        lines.append(
            f"{accumulation} micro-batches: the loss with sums in bf16 minus that with sums in fp32 is "
            f"**{statistics.mean(values):+.4f}**{error}, mean over {options.pluralize(len(values), 'seed')}."
        )
    return lines


def errors_in_words(errors: dict[str, dict[str, float]]) -> list[str]:
    """Describe the errors of sums."""
    return [
        f"a sum of {number} gradients has a relative error of {100 * of_sum['each']:.2f} % with every addition in "
        f"bf16, and of {100 * of_sum['once']:.2f} % with additions in fp32 and one rounding to bf16."
        for number, of_sum in errors.items()
    ]


def draw(results: dict[str, Any]) -> Any:
    """Draw the held-out losses of each pair."""
    pairs = list(dict.fromkeys((run["accumulation"], run["seed"]) for run in results["runs"]))
    figure, axes = result_files.pyplot().subplots(figsize=(8.0, 1.4 + 0.35 * len(pairs)), layout="constrained")
    for sums, color in COLORS.items():
        runs = [run for run in results["runs"] if run["sums"] == sums]
        places = [-pairs.index((run["accumulation"], run["seed"])) for run in runs]
        axes.plot([run["loss"] for run in runs], places, "o", color=color, label=f"sums in {sums}")
    labels = [f"{accumulation} micro-batches, seed {seed}" for accumulation, seed in pairs]
    axes.set_yticks([-place for place in range(len(pairs))], labels)
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel("held-out loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Held-out loss by the precision that gradients are added up in", loc="left", fontweight="bold")
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = result_files.build_parser(__doc__)
    for name, meaning in (("model_name_or_path", "model"), ("train_file", "text"), ("validation_file", "text")):
        parser.add_argument(
            f"--{name}", required=True, help=f"the {meaning}, a local {'folder' if meaning == 'model' else 'file'}"
        )
    parser.add_argument("--accumulation", nargs="+", type=int, default=[16], help="micro-batches of a step; 16")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4], help="1 2 3 4 by default")
    parser.add_argument("--max_seq_length", type=int, default=64, help="tokens of a row; 64 by default")
    parser.add_argument("--max_steps", type=int, default=200, help="steps of each run; 200 by default")
    parser.add_argument("--learning_rate", type=float, default=0.1, help="0.1 by default")
    return parser.parse_args()


def main() -> None:
    """Train every pair, and write the results after each run."""
    result_files.require("matplotlib")
    args = parse_arguments()
    job = PairedJob(
        args.model_name_or_path,
        args.train_file,
        args.validation_file,
        args.max_seq_length,
        args.max_steps,
        args.learning_rate,
    )
    results: dict[str, Any] = {"environment": result_files.environment(), "job": asdict(job), "errors": {}, "runs": []}
    planned = list(product(args.accumulation, args.seeds, SUMS))
    with Workers(1, "cpu") as workers:
        (results["errors"],) = workers.call(sum_errors, job)
        for number, (accumulation, seed, sums) in enumerate(tqdm(planned, desc="training", unit=" runs")):
            results["runs"] += workers.call(train, job, accumulation, seed, sums)
            result_files.write_results(
                args.output_dir, "sums", results, describe(results), draw(results), number == len(planned) - 1
            )


if __name__ == "__main__":
    main()
