"""Write the corpus, tokenizer and tiny model that launch/configs/demo.yaml trains on."""

import argparse
from pathlib import Path

from lomo_ds.models.demo import make_demo

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("demo"), help="folder to write")
    make_demo(parser.parse_args().output_dir)
