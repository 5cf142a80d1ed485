"""Each kind of input: how one is drawn, and what holds for it."""

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
        name: as the table has it.
        inputs: draws one.
        check: given groups of ranks, an empty folder and an input, does the work that a user would ask for. Returns
            whether it was done, and not refused in one sentence; raises whatever is a fault.
        done: what is done.
        turn: inputs of one turn, which take a few seconds.
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
            st.builds(test_inputs.replaced, st.sampled_from(test_inputs.SHIPPED), test_inputs.replacements),
            test_inputs.agreeing_and_not,
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
