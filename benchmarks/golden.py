"""Digests of trained weights, which say whether a change of the code has changed any bit of them.

    python benchmarks/golden.py --save before.json         # before the change
    python benchmarks/golden.py --compare before.json      # after it

The program trains a tiny LLaMA from a seed with every format of the weights, schedule, rule and number of ranks, and
prints the SHA-256 digest of the shards of all ranks. ``--compare`` marks the digests that differ from a saved table and
exits with status 1 if any does. Bits also depend on the processor and on the versions of the packages, so a table is
only good for the machine that it was saved on. A change that rounds differently on purpose changes digests; which ones
shows whether it has reached more than it should.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.lib import result_files
from benchmarks.lib.workers import RankState, Workers

# precision of the computation, and the parameter ``weights`` of LOMO
FORMATS = {
    "fp32": ("fp32", "auto"),
    "bf16": ("bf16", "auto"),
    "fp32+int8": ("fp32", "int8"),
    "bf16+int8": ("bf16", "int8"),
}
CLIPS = 0.3  # norm that the gradients of almost every step exceed
# schedule, norm to clip to, and micro-batches in a step
SCHEDULES = {
    "immediate": ("immediate", 0.0, 1),
    "stash+clip": ("stash", CLIPS, 1),
    "two_pass+clip": ("two_pass", CLIPS, 1),
    "stash+clip+accumulation": ("stash", CLIPS, 2),
}
LEARNING_RATES = {"lomo": 0.1, "adalomo": 0.01}
ROWS, TOKENS = 2, 16  # in a micro-batch of a rank
SHOWN = 16  # characters of a digest that are printed
# sizes that the ranks cannot share evenly
MODEL = {
    "vocab_size": 61,
    "hidden_size": 20,
    "intermediate_size": 33,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": TOKENS,
}


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        ranks: number of ranks.
        format, schedule, rule: keys of ``FORMATS``, ``SCHEDULES`` and ``LEARNING_RATES``.
    """

    ranks: int
    format: str
    schedule: str
    rule: str

    @property
    def name(self) -> str:
        """The name in a table of digests."""
        return f"{self.ranks} | {self.format} | {self.schedule} | {self.rule}"

    def ds_config(self, learning_rate: float) -> dict[str, Any]:
        """Return the DeepSpeed config; only some of the parameters stay gathered."""
        precision, weights = FORMATS[self.format]
        schedule, norm, micro_batches = SCHEDULES[self.schedule]
        params = {"lr": learning_rate, "weight_decay": 0.01, "update_schedule": schedule, "weights": weights}
        return {
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_accumulation_steps": micro_batches,
            "gradient_clipping": norm,
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 50},
            "optimizer": {"type": self.rule, "params": params},
        }


def train(state: RankState, case: Case, steps: int, learning_rate: float) -> bytes:
    """Train on a rank, and return the digest of its shards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import lomo_ds
    from lomo_ds import zero3

    config = case.ds_config(learning_rate)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    model = model.bfloat16() if config["bf16"]["enabled"] else model
    engine = lomo_ds.initialize(model=model, config=config)[0]
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(steps):
        drawn = torch.randint(MODEL["vocab_size"], (SCHEDULES[case.schedule][2], ROWS, TOKENS), generator=generator)
        batches = [{"input_ids": ids, "labels": ids.clone()} for ids in drawn]
        engine.train_batch(batches if len(batches) > 1 else batches[0])
    digest = hashlib.sha256()
    for shard in zero3.shards(engine.module):
        digest.update(shard.read().contiguous().view(torch.uint8).numpy().tobytes())
    engine.destroy()
    return digest.digest()


def compute(cases: list[Case], steps: int) -> dict[str, str]:
    """Return the digest of each case over the shards of all ranks, by name."""
    digests = {}
    with tqdm(total=len(cases), desc="training", unit=" models") as bar:
        for ranks in dict.fromkeys(case.ranks for case in cases):
            with Workers(ranks, "cpu") as workers:
                for case in (case for case in cases if case.ranks == ranks):
                    of_ranks = workers.call(train, case, steps, LEARNING_RATES[case.rule])
                    digests[case.name] = hashlib.sha256(b"".join(of_ranks)).hexdigest()
                    bar.update()
    return digests


def differing(digests: dict[str, str], saved: dict[str, str]) -> list[str]:
    """Return the names of the cases in both tables whose digests differ."""
    return [name for name, digest in digests.items() if saved.get(name, digest) != digest]


def describe(digests: dict[str, str], saved: dict[str, str]) -> str:
    """Format digests as Markdown, with those of a saved table that differ beside them."""
    differ = differing(digests, saved)
    rows = []
    for name, digest in digests.items():
        remark = f"**differs** from {saved[name][:SHOWN]}" if name in differ else "" if name in saved else "not saved"
        rows.append([*name.split(" | "), digest[:SHOWN], *([remark] if saved else [])])
    return result_files.table(["ranks", "weights", "schedule", "rule", "digest", *(["saved"] if saved else [])], rows)


def other_conditions(here: dict[str, Any], there: dict[str, Any]) -> list[str]:
    """Return the conditions that bits depend on and that differ between the environments of two tables."""
    conditions = [{"processor": each["machine"]["cpu"], **each["versions"]} for each in (here, there)]
    return [f"{name}: {conditions[1].get(name)}, now {value}" for name, value in conditions[0].items()
            if conditions[1].get(name) != value]  # fmt: skip


def main() -> None:
    """Compute the digests, and save or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the table to a JSON file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with a table that --save has written")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="1 2 by default")
    parser.add_argument("--steps", type=int, default=20, help="20 by default")
    for name, values in (("formats", FORMATS), ("schedules", SCHEDULES), ("rules", LEARNING_RATES)):
        parser.add_argument(f"--{name}", nargs="+", choices=values, default=list(values), help="all by default")
    args = parser.parse_args()
    table = json.loads(args.compare.read_text()) if args.compare else {"steps": args.steps, "digests": {}}
    if table["steps"] != args.steps:
        parser.error(f"{args.compare} was saved with --steps {table['steps']}, got --steps {args.steps}")
    cases = [Case(*values) for values in product(args.ranks, args.formats, args.schedules, args.rules)]
    environment, digests, saved = result_files.environment(), compute(cases, args.steps), table["digests"]
    print(describe(digests, saved))
    if args.save:
        results = {"environment": environment, "steps": args.steps, "digests": digests}
        result_files.write_text(args.save, json.dumps(results, indent=1) + "\n")
    if args.compare:
        differ = differing(digests, saved)
        print(f"{len(differ)} of {len(digests.keys() & saved.keys())} digests differ from {args.compare}")
        for line in other_conditions(environment, table["environment"]):
            print(f"- saved with another {line}")
        sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
