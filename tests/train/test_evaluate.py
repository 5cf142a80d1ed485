"""Held-out loss and generation over ranks against one process."""

from collections.abc import Callable

import deepspeed.comm as dist
import numpy as np
import pytest
import torch

from lomo_ds.data import PackedSequences, evaluation_batches
from lomo_ds.train.evaluate import evaluate_loss
from tests.data.datasets import text_blocks
from tests.engines import make_engine
from tests.ranks import Ranks
from tests.reference import VOCABULARY, tiny_model


def blocks() -> PackedSequences:
    """Seven sequences, the last of five tokens only."""
    generator = np.random.default_rng(0)
    return text_blocks(generator.integers(VOCABULARY, size=6 * 12 + 5), length=12)


def evaluate() -> tuple[float | None, bool]:
    engine = make_engine(tiny_model(dropout=0.5))
    loss = evaluate_loss(engine, evaluation_batches(blocks(), 2, dist.get_rank(), dist.get_world_size()))
    return loss, engine.module.training


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_loss_is_the_mean_over_all_tokens(ranks: Callable[..., Ranks], world_size: int) -> None:
    model = tiny_model(dropout=0.5).eval()
    with torch.no_grad():
        summed = [
            (float(model(**{name: value.unsqueeze(0) for name, value in block.items()}).loss) * tokens, tokens)
            for block in (blocks()[index] for index in range(7))
            for tokens in [int((block["labels"][1:] != -100).sum())]
        ]
    exact = sum(loss for loss, _ in summed) / sum(tokens for _, tokens in summed)
    for loss, training in ranks(world_size).run(evaluate):
        assert loss == pytest.approx(exact, abs=1e-6)
        assert training, "back in training mode"
