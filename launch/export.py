"""Turn a checkpoint of training into a Hugging Face model folder; one process, no GPU.

python launch/export.py --checkpoint out/checkpoint-300 --output_dir model
"""

import argparse
import sys
from pathlib import Path

from lomo_ds.train.cli import run_in_one_process
from lomo_ds.train.export_checkpoint import export_checkpoint


def main(argv: list[str]) -> int:
    """Parse, export, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of a checkpoint, or of a run")
    parser.add_argument("--output_dir", type=Path, required=True, help="new folder to write the model to")
    parser.add_argument("--max_shard_size", default="5GB", help="of one output file (default %(default)s)")
    parser.add_argument("--model_name_or_path", help="configuration and tokenizer, where the checkpoint has none")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    args = parser.parse_args(argv)
    return run_in_one_process(
        lambda: export_checkpoint(
            args.checkpoint, args.output_dir, args.max_shard_size, args.model_name_or_path, args.trust_remote_code
        )
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
