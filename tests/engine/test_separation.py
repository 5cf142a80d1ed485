"""The check that packed documents do not see each other, on every model family and in a job."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from lomo_ds.engine import separation
from lomo_ds.engine.packed_rows import PackedRows
from lomo_ds.engine.separation import check_separation, sees_other_documents
from lomo_ds.errors import ConfigError
from tests.data.datasets import write_jsonl
from tests.engine.test_packed_batches import documents, packed, separate_loss
from tests.engines import make_engine, weights_of
from tests.flash_attention import replaced_flash_attention
from tests.launching import demo_arguments, run_main
from tests.models.test_families import FAMILIES, tiny_config
from tests.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

GroupOf = Callable[..., Ranks]
# as docs/models.md says
IGNORE_RESTARTS = {"afmoe", "biogpt", "bloom", "gpt_oss", "mamba", "mpt", "opt", "xglm"}
IS_OLDER = Version(transformers.__version__) < Version("5.24")
if IS_OLDER:
    IGNORE_RESTARTS.add("falcon")


def model_of(family: str, attention: str | None = None) -> Any:
    """Build a model whose tokens depend on each other enough to see."""
    model_type, changes = FAMILIES[family]
    assert isinstance(changes, dict)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, changes), attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


def loss_difference(model: Any) -> float:
    """Return how far the loss of a packed batch is from that of its documents."""
    rows = [[document.clamp(min=3) for document in row] for row in documents(2)]
    return float((model(**packed(rows)).loss - separate_loss(model, rows)).abs())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_agrees_with_the_loss(family: str) -> None:
    if IS_OLDER and family == "doge":
        pytest.skip(
            "the sparse attention of doge differs in packed rows with transformers before 5.24, and no check knows"
        )
    model = model_of(family)
    PackedRows(model)
    is_exact = loss_difference(model) < 1e-5
    assert is_exact == (family not in IGNORE_RESTARTS)
    assert [sees_other_documents(model, 61, rows, "cpu") for rows in (1, 2)] == [not is_exact] * 2


@torch.no_grad()
@pytest.mark.parametrize(("family", "rows"), [("llama 3", 2), ("afmoe", 2), ("biogpt", 2), ("opt", 2), ("nemotron", 1)])
def test_families_that_flash_attention_separates(family: str, rows: int) -> None:
    with replaced_flash_attention():
        model = model_of(family, "flash_attention_2")
        PackedRows(model)
        assert not sees_other_documents(model, 61, rows, "cpu")


@torch.no_grad()
def test_several_rows_of_a_family_that_drops_the_arguments_of_flash_attention() -> None:
    with replaced_flash_attention():
        model = model_of("nemotron", "flash_attention_2")
        PackedRows(model)
        assert loss_difference(model) > 1e-3
        assert sees_other_documents(model, 61, 2, "cpu")


def check_of_an_engine(family: str) -> tuple[str, bool, bool]:
    engine = make_engine(model_of(family).train())
    before = weights_of(engine)
    message = ""
    try:
        check_separation(engine, rows=2)
    except ConfigError as error:
        message = str(error)
    after = weights_of(engine)
    return message, engine.module.training, all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["llama 3", "opt"])
def test_an_engine_is_checked_and_left_as_it_was(ranks: GroupOf, family: str) -> None:
    for message, training, same in ranks(2).run(check_of_an_engine, family):
        assert (training, same) == (True, True)
        if family == "opt":
            assert "must not see each other, but in OPTForCausalLM they do, with sdpa attention and 2 row(s)" in message
        else:
            assert message == ""


def train_on_documents(arguments: list[str], sees_others: bool) -> tuple[int, str]:
    original = sees_other_documents
    with mock.patch.object(separation, "sees_other_documents", lambda *given: sees_others or original(*given)):
        status, _, said = run_main(arguments)
    return status, said


def test_a_job_trains_on_documents_or_refuses_to(ranks: GroupOf, demo: Path, tmp_path: Path) -> None:
    rows = [{"text": line} for line in (demo / "train.txt").read_text().splitlines()[:40]]
    more = {"train_file": write_jsonl(tmp_path / "a.jsonl", rows), "packing_strategy": "bfd", "max_steps": 1}
    arguments = demo_arguments(demo, tmp_path, **more)
    assert [status for status, _ in ranks(2).run(train_on_documents, arguments, False)] == [0, 0]
    refused = demo_arguments(demo, tmp_path / "other", **more)
    results = ranks(2).run(train_on_documents, refused, True)
    assert [status for status, _ in results] == [2, 2]
    assert "train it without packing" in results[0][1]
