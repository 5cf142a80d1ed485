"""Fine-tune all the weights of a causal language model.

deepspeed --num_gpus 8 launch/train.py --config launch/configs/demo.yaml
"""

import sys

from lomo_ds.arguments import help_text, parse_arguments
from lomo_ds.cli import leave, run_on_all_ranks
from lomo_ds.distributed import is_main_process
from lomo_ds.trainer import train


def main(argv: list[str]) -> int:
    """Parse, train, and return the exit status."""
    if "--help" in argv or "-h" in argv:
        if is_main_process():
            print(help_text())
        return 0
    return run_on_all_ranks(lambda: train(*parse_arguments(argv)))


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
