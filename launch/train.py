"""Fine-tune all the weights of a causal language model.

deepspeed --num_gpus 8 launch/train.py --config launch/configs/demo.yaml
"""

import sys

from lomo_ds.train.signals import StopRequest


def main(argv: list[str]) -> int:
    """Parse, train, and return the exit status."""
    with StopRequest() as stop:  # before the imports, which take longer than some schedulers wait
        from lomo_ds.config.arguments import help_text, parse_arguments
        from lomo_ds.distributed.process_group import is_main_process
        from lomo_ds.train.cli import run_on_all_ranks, show_traceback
        from lomo_ds.train.job import train

        if "--help" in argv or "-h" in argv:
            if is_main_process():
                print(help_text())
            return 0

        def run() -> None:
            arguments, explicit = parse_arguments(argv)
            with show_traceback(arguments.debug):
                train(arguments, explicit, stop)

        return run_on_all_ranks(run)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    from lomo_ds.train.cli import exit_now

    exit_now(status)
