r"""Will a model fit, what will bound its step, and what is the smallest change that makes it fit; without a GPU.

python launch/plan.py --num_gpus 8 --gpu_memory 24GB --host_memory 256GB --pcie 16GB/s \
    --model_name_or_path 65b --max_seq_length 1024 --per_device_train_batch_size 1
"""

import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or deepspeed prints that it finds no GPU, in the middle of --json

from lomo_ds.planner.command import main
from lomo_ds.train.cli import run_in_one_process

if __name__ == "__main__":
    sys.exit(run_in_one_process(lambda: main(sys.argv[1:])))
