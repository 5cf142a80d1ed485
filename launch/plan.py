"""Will a model fit, what will bound its step, and what is the smallest change that makes it fit; without a GPU.

python launch/plan.py --model 65b --gpus 8 --gpu_memory 24GB --host_memory 256GB --seq 1024 --batch 1 --pcie 16GB/s
"""

import sys

from lomo_ds.planner.command import main
from lomo_ds.train.cli import run_alone

if __name__ == "__main__":
    sys.exit(run_alone(lambda: main(sys.argv[1:])))
