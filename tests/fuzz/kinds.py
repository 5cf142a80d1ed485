"""All kinds of inputs: how to draw one, and how to check it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.engine import test_any_model
from tests.fuzz import model_folders, test_inputs, trained_configs
from tests.models import test_tokenizer
from tests.ranks import GroupOf

TRAINED = "trained"
READ = "read"


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: the name in the table of results.
        inputs: the strategy that draws an input.
        check: called with groups of ranks, an empty folder and an input; does what a user would do with the input.
            Returns True if that succeeded and False if there was a one-line error message; raises for a fault.
        done: the name of a success in the table of results.
        turn: the number of inputs of one turn, which take a few seconds.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[GroupOf, Path, Any], bool]
    done: str = READ
    turn: int = 500


KINDS = [
    Kind(
        "configs that train",
        trained_configs.configs,
        lambda ranks, folder, config: trained_configs.check_config(ranks, config),
        TRAINED,
        turn=80,
    ),
    Kind(
        "models and batches",
        test_any_model.steps(),
        lambda ranks, folder, step: test_any_model.check_step(ranks(2), step),
        TRAINED,
        turn=20,
    ),
    Kind(
        "model folders",
        model_folders.folders,
        lambda ranks, folder, changes: model_folders.check_folder(ranks, changes),
        turn=80,
    ),
    Kind(
        "tokenizer folders",
        st.tuples(test_tokenizer.folders, test_tokenizer.texts),
        lambda ranks, folder, drawn: test_tokenizer.check_folder(folder, *drawn),
        turn=200,
    ),
    Kind(
        "fields of ds_config",
        st.tuples(
            st.builds(test_inputs.replace_fields, st.sampled_from(test_inputs.SHIPPED), test_inputs.replacements),
            test_inputs.argument_lists,
        ),
        lambda ranks, folder, drawn: test_inputs.check_ds_config(*drawn),
        turn=200,
    ),
    Kind(
        "files of ds_config",
        test_inputs.config_files,
        lambda ranks, folder, content: test_inputs.check_ds_config_file(folder, content),
    ),
    Kind(
        "YAML",
        test_inputs.yaml_files,
        lambda ranks, folder, content: test_inputs.check_yaml(folder, content) is not None,
    ),
    Kind(
        "command lines",
        test_inputs.command_lines,
        lambda ranks, folder, argv: test_inputs.check_arguments(argv) is not None,
    ),
    Kind(
        "YAML that is dumped",
        test_inputs.accepted,
        lambda ranks, folder, drawn: test_inputs.check_dumped(folder, drawn),
    ),
    Kind(".jsonl", test_inputs.jsonl_files, lambda ranks, folder, content: test_inputs.check_jsonl(folder, content)),
    Kind(".txt", test_inputs.txt_files, lambda ranks, folder, content: test_inputs.check_txt(folder, content)),
]
