"""Kills training at random moments, resumes it, and compares the final weights with those of an undisturbed run.

    python benchmarks/faults.py --trials 50

Each trial kills one rank or all ranks with SIGKILL at a random moment of the run, in 30 % of the trials within a save,
and then starts the job again with --resume_from_checkpoint auto. The benchmark counts how often the final weights are
bit-identical to those of an undisturbed run, and how long the surviving ranks took to end. It runs on CPU ranks.
"""

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files

ROOT = Path(__file__).parent.parent
RANKS = 2
SHARE_IN_A_SAVE = 0.3  # share of trials; a random moment is rarely within a save
RESTART = ["--resume_from_checkpoint=auto"]


class Job:
    """The ranks of one training job, forked from a process that has imported everything.

    Args:
        argv: arguments of launch/train.py.
        log: file for the output of all ranks, stderr included.
    """

    def __init__(self, argv: list[str], world_size: int, log: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["lomo_ds.train.job"])
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        self.log = log
        log.touch()
        self.processes = [
            context.Process(target=_run_rank, args=(argv, rank, world_size, port, str(log)))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: signal.Signals, ranks: list[int]) -> None:
        """Send a signal to ranks."""
        for rank in ranks:
            pid = self.processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def wait(self, timeout: float = 300.0) -> list[int | None]:
        """Return the exit status of each rank, negative for a signal; None if it runs for more than ``timeout`` s."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def end(self) -> None:
        """Kill the ranks that still run."""
        for process in self.processes:
            process.kill()
            process.join()


def _run_rank(argv: list[str], rank: int, world_size: int, port: int, log: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell would ignore it
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from lomo_ds.train.cli import exit_now

    exit_now(runpy.run_path(str(ROOT / "launch/train.py"))["main"](argv))


def training_arguments(demo: Path, output_dir: Path, steps: int, precision: str = "bf16") -> list[str]:
    """Return arguments of a run with a checkpoint every other step; in bf16, rounding draws random numbers too."""
    arguments: dict[str, Any] = {
        "model_name_or_path": demo / "model",
        "train_file": demo / "train.txt",
        "output_dir": output_dir,
        "deepspeed": ROOT / f"ds_configs/zero3_{precision}.json",
        "max_seq_length": 32,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.5,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": 2,
        "save_total_limit": 2,
    }
    return [f"--{name}={value}" for name, value in arguments.items()]


def demo_with_dropout(folder: Path) -> Path:
    """Make the model and data of ``make train``, with dropout."""
    from lomo_ds.models.demo import make_demo

    make_demo(folder)
    config = folder / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.1}))
    return folder


def weights_of(output_dir: Path) -> bytes:
    """Return the bytes of the exported weights."""
    return (output_dir / "model.safetensors").read_bytes()


def kill_and_resume(
    argv: list[str], output_dir: Path, moment: float, victims: list[int], in_a_save: bool
) -> dict[str, Any]:
    """Run one trial and return its result.

    Args:
        moment: seconds after the start at which ``victims`` are killed.
        in_a_save: wait until the next save has begun.
    """
    job = Job(argv, RANKS, output_dir.with_suffix(".first.log"))
    job.processes[0].join(moment)
    while in_a_save and job.processes[0].is_alive() and not list(output_dir.glob("checkpoint-*.partial")):
        time.sleep(0.001)
    steps_done = last_step(output_dir)
    job.signal(signal.SIGKILL, [rank for rank in victims if job.processes[rank].is_alive()])
    killed, in_save = time.monotonic(), bool(list(output_dir.glob("checkpoint-*.partial")))
    first = job.wait(timeout=30.0)
    noticed = time.monotonic() - killed
    job.end()
    resumed = Job([*argv, *RESTART], RANKS, output_dir.with_suffix(".second.log"))
    second = resumed.wait()
    resumed.end()
    return {
        "victims": victims,
        "moment": round(moment, 2),
        "steps_done": steps_done,
        "in_save": in_save,
        "spared_ended_after": round(noticed, 2) if len(victims) < RANKS else None,
        "sentence": "has died" in job.log.read_text() if len(victims) < RANKS else None,
        "exit_statuses": first,
        "exit_statuses_resumed": second,
    }


def last_step(output_dir: Path) -> int:
    """Return the last step in metrics.jsonl; 0 if none was logged."""
    lines = (output_dir / "metrics.jsonl").read_text().splitlines() if (output_dir / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def run_trials(trials: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run an undisturbed run and all trials."""
    demo = demo_with_dropout(folder / "demo")
    undisturbed = folder / "undisturbed"
    Job(training_arguments(demo, folder / "warm", 1), RANKS, folder / "warm.log").wait()  # the first start is slower
    start = time.monotonic()
    reference = Job(training_arguments(demo, undisturbed, steps), RANKS, folder / "undisturbed.log")
    if reference.wait() != [0] * RANKS:
        sys.exit(f"the undisturbed run failed:\n{reference.log.read_text()}")
    duration = time.monotonic() - start
    expected = weights_of(undisturbed)
    rng = random.Random(seed)
    trial_results = []
    for trial in tqdm(range(trials), desc="killing", unit=" trials"):
        output_dir = folder / f"trial{trial}"
        victims = rng.choice([[rank] for rank in range(RANKS)] + [list(range(RANKS))])
        moment = rng.uniform(0.0, duration)
        in_a_save = rng.random() < SHARE_IN_A_SAVE
        result = kill_and_resume(training_arguments(demo, output_dir, steps), output_dir, moment, victims, in_a_save)
        exported = output_dir / "model.safetensors"
        result["identical"] = exported.exists() and weights_of(output_dir) == expected
        trial_results.append(result)
        if result["identical"]:
            shutil.rmtree(output_dir)
    return {"duration": duration, "steps": steps, "trials": trial_results}


def summarize(results: dict[str, Any]) -> dict[str, Any]:
    """Summarize the trials."""
    trials = results["trials"]
    met = [t for t in trials if len(t["victims"]) < RANKS and t["steps_done"] and -signal.SIGKILL in t["exit_statuses"]]
    ended = [t["spared_ended_after"] for t in met]
    return {
        "trials": len(trials),
        "identical": sum(t["identical"] for t in trials),
        "before the first step": sum(not t["steps_done"] for t in trials),
        "within a save": sum(t["in_save"] for t in trials),
        "one rank killed in training": len(met),
        "of these, the other one said so": sum(t["sentence"] for t in met),
        "seconds until the other one ended, median": statistics.median(ended) if ended else None,
        "seconds until the other one ended, longest": max(ended, default=None),
    }


def describe(summary: dict[str, Any]) -> str:
    """Format the summary as Markdown."""
    rows = [[name, str(value)] for name, value in summary.items()]
    return (
        f"# Killed at {summary['trials']} random moments\n\n"
        f"{RANKS} ranks, SIGKILL to one or all of them, then resumed with --resume_from_checkpoint auto: the "
        f"final weights are bit-identical to those of an undisturbed run in **{summary['identical']} of "
        f"{summary['trials']}**.\n\n{result_files.table(['', ''], rows)}\n"
        "Only a launcher notices a rank that is killed before the process group exists, and the trials have none.\n"
    )


def draw(results: dict[str, Any]) -> Any:
    """Draw the moments and victims of all trials, and their outcomes."""
    pyplot = result_files.pyplot()
    figure, axes = pyplot.subplots(figsize=(9, 3.4), layout="constrained")
    rows = {str([rank]): rank for rank in range(RANKS)} | {str(list(range(RANKS))): RANKS}
    for identical, color, label in ((True, "#1b7f79", "bit-identical"), (False, "#c0392b", "not identical")):
        for in_save, size, where in ((False, 40, ""), (True, 110, ", killed within a save")):
            chosen = [t for t in results["trials"] if t["identical"] == identical and t["in_save"] == in_save]
            if chosen:
                places = [t["moment"] for t in chosen], [rows[str(t["victims"])] for t in chosen]
                axes.scatter(*places, s=size, color=color, alpha=0.7, label=label + where)
    axes.set_yticks(list(rows.values()), [*(f"rank {rank}" for rank in range(RANKS)), "all ranks"])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"time of the kill in seconds after the start, of a run of {results['duration']:.0f} s")
    summary = results["summary"]
    axes.set_title(
        f"{summary['identical']} of {summary['trials']} killed runs end with the weights of an undisturbed run",
        loc="left",
        fontweight="bold",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def main() -> None:
    """Run the benchmark and write its results."""
    parser = result_files.build_parser(__doc__)
    parser.add_argument("--trials", type=int, default=50, help="runs that are killed; 50 by default")
    parser.add_argument(
        "--steps", type=int, default=24, help="steps of each run, with a checkpoint every other step; 24 by default"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of moments and victims")
    args = parser.parse_args()
    result_files.require("matplotlib")
    os.environ["DS_ACCELERATOR"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        results = run_trials(args.trials, args.steps, args.seed, Path(folder))
    results |= {"environment": result_files.environment(), "summary": summarize(results)}
    result_files.write_results(args.output_dir, "faults", results, describe(results["summary"]), draw(results))
    if results["summary"]["identical"] < args.trials:
        sys.exit("some runs did not end with the weights of the undisturbed run")


if __name__ == "__main__":
    main()
