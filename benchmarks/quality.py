"""Compares optimizers by their held-out loss after the same job, each with several learning rates.

    python benchmarks/quality.py --model_name_or_path MODEL --train_file FILE --validation_file FILE

Every run is one start of ``launch/train.py``: same model, text, order of rows and number of steps. The report gives the
held-out loss of each learning rate, and compares the best of each optimizer. It runs on CPU ranks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files

ROOT = Path(__file__).parent.parent
# for small models; large ones want smaller rates
LEARNING_RATES = {"lomo": [0.3, 1.0, 2.0], "adalomo": [1e-2, 2e-2, 3e-2], "adamw": [1e-3, 3e-3, 5e-3]}
COLORS = {"lomo": "#1f77b4", "adalomo": "#2ca02c", "adamw": "#d62728", "sgd": "#9467bd"}

Run = dict[str, Any]


def train(args: argparse.Namespace, optimizer: str, learning_rate: float, seed: int, folder: Path) -> Run:
    """Run one job, and return its settings, its held-out losses and its seconds per step.

    Raises:
        RuntimeError: the job failed; the message ends with what it wrote.
    """
    arguments = {
        "model_name_or_path": args.model_name_or_path,
        "train_file": args.train_file,
        "validation_file": args.validation_file,
        "max_seq_length": args.max_seq_length,
        "per_device_train_batch_size": args.rows // args.ranks,
        "max_steps": args.max_steps,
        "optim": optimizer,
        "learning_rate": learning_rate,
        "seed": seed,
        "deepspeed": args.deepspeed,
        "output_dir": folder,
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
    command = [*launcher, str(ROOT / "launch/train.py"), *(f"--{name}={value}" for name, value in arguments.items())]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    job = subprocess.run(command, capture_output=True, text=True, env=environment)
    if job.returncode:
        raise RuntimeError(f"{optimizer} with learning rate {learning_rate:g} failed:\n{job.stdout}{job.stderr}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "seed": seed,
        "loss_before": losses[0],
        "loss": losses[-1],
    }


def best_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Return the runs of each optimizer with the learning rate whose mean loss is the lowest."""
    best = {}
    for optimizer in dict.fromkeys(run["optimizer"] for run in runs):
        by_rate: dict[float, list[Run]] = {}
        for run in runs:
            if run["optimizer"] == optimizer:
                by_rate.setdefault(run["learning_rate"], []).append(run)
        best[optimizer] = min(by_rate.values(), key=mean_loss)
    return best


def mean_loss(runs: list[Run]) -> float:
    """Return the mean held-out loss of runs."""
    return sum(run["loss"] for run in runs) / len(runs)


def describe(results: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    best = best_runs(results["runs"])
    seeds = sorted({run["seed"] for run in results["runs"]})
    rows = [
        [run["optimizer"], f"{run['learning_rate']:g}", str(run["seed"]), _loss(run, run in best[run["optimizer"]])]
        for run in results["runs"]
    ]
    lines = [
        f"- {optimizer}: **{mean_loss(runs):.3f}** with learning rate {runs[0]['learning_rate']:g}"
        for optimizer, runs in sorted(best.items(), key=lambda entry: mean_loss(entry[1]))
    ]
    return (
        f"# Held-out loss of {len(best)} optimizers after the same job\n\n"
        f"{results['max_steps']} steps of {results['rows']} rows of {results['max_seq_length']} tokens on "
        f"{results['ranks']} ranks, linear decay to 0, {results['deepspeed']}; "
        f"{results['runs'][0]['loss_before']:.3f} nats before. Best learning rate of each, mean over "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}:\n\n"
        + "\n".join(lines)
        + "\n\n"
        + result_files.table(["optimizer", "learning rate", "seed", "held-out loss"], rows)
    )


def _loss(run: Run, is_best: bool) -> str:
    return f"**{run['loss']:.4f}**" if is_best else f"{run['loss']:.4f}"


def draw(results: dict[str, Any]) -> Any:
    """Draw the held-out loss of each optimizer over its learning rate."""
    figure, axes = result_files.pyplot().subplots(figsize=(7.0, 4.2), layout="constrained")
    for optimizer in dict.fromkeys(run["optimizer"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["optimizer"] == optimizer]
        rates = sorted({run["learning_rate"] for run in runs})
        means = [mean_loss([run for run in runs if run["learning_rate"] == rate]) for rate in rates]
        axes.plot(rates, means, marker="o", label=optimizer, color=COLORS.get(optimizer))
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss, nats per token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("Held-out loss after the same job", loc="left", fontsize=12, fontweight="bold")
    return figure


def learning_rates(text: str) -> tuple[str, list[float]]:
    """Parse ``optimizer=rate,rate`` from the command line."""
    optimizer, _, rates = text.partition("=")
    try:
        return optimizer, [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be like lomo=0.3,1, got {text!r}") from None


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = result_files.build_parser(__doc__)
    for name, meaning in (("model_name_or_path", "model"), ("train_file", "text"), ("validation_file", "text")):
        parser.add_argument(f"--{name}", required=True, help=f"the {meaning}, as for launch/train.py")
    defaults = [f"{name}={','.join(f'{rate:g}' for rate in rates)}" for name, rates in LEARNING_RATES.items()]
    parser.add_argument(
        "--optimizers", nargs="+", type=learning_rates, default=list(LEARNING_RATES.items()), metavar="NAME=RATE,RATE",
        help=f"names of --optim with their learning rates; {' '.join(defaults)} by default",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[42], help="seeds; 42 by default")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks; 2 by default")
    parser.add_argument("--rows", type=int, default=16, help="rows of a step over all ranks; 16 by default")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens of a row; 128 by default")
    parser.add_argument("--max_steps", type=int, default=300, help="steps of each run; 300 by default")
    parser.add_argument("--deepspeed", default="zero3_fp32", help="DeepSpeed config; zero3_fp32 by default")
    parser.add_argument("--name", default="quality", help="name of the result files; quality by default")
    return parser.parse_args()


def main() -> None:
    """Train with every optimizer, learning rate and seed, and write the results after each run."""
    result_files.require("matplotlib")
    args = parse_arguments()
    settings = ("ranks", "rows", "max_seq_length", "max_steps", "deepspeed")
    results: dict[str, Any] = {name: getattr(args, name) for name in settings}
    results |= {"environment": result_files.environment(), "runs": []}
    planned = [(name, rate, seed) for name, rates in args.optimizers for rate in rates for seed in args.seeds]
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, rate, seed) in enumerate(tqdm(planned, desc="training", unit=" runs")):
            results["runs"].append(train(args, name, rate, seed, Path(temporary) / str(number)))
            result_files.write_results(
                args.output_dir, args.name, results, describe(results), draw(results), number == len(planned) - 1
            )


if __name__ == "__main__":
    main()
