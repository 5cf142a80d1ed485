"""A check of what a model computes: packed documents must not see each other, but some ignore ``position_ids``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lomo_ds.engine.protocol import TrainingEngine
from lomo_ds.errors import ConfigError

LENGTH = 8  # tokens of each document
# The later document's logits must change less than this share of what they change if the two are one document. They do
# not change at all, except that experts round sums of other sizes differently.
SHARE = 0.1


@torch.no_grad()
def check_separation(engine: TrainingEngine, rows: int) -> None:
    """Check that no document in a packed row sees another one; every rank must call this.

    Args:
        engine: the engine of a causal transformers model.
        rows: rows per micro-batch.

    Raises:
        ConfigError: a document's logits depend on the document before it.
    """
    training = engine.module.training
    engine.eval()
    try:
        vocabulary = engine.module.config.get_text_config().vocab_size
        sees_others = sees_other_documents(engine, vocabulary, rows, engine.device)
    finally:
        engine.train(training)
    if sees_others:
        raise ConfigError(
            f"packed documents must not see each other, but in {type(engine.module).__name__} they do, with "
            f"{engine.module.config._attn_implementation} attention and {rows} row(s) per micro-batch; train it "
            "without packing"
        )


def sees_other_documents(model: Callable[..., Any], vocabulary: int, rows: int, device: torch.device | str) -> bool:
    """Return whether the second of two documents in a row sees the first, in forwards of at most ``rows`` rows."""
    count = torch.arange(LENGTH, device=device)
    first, other_first, second = ((count * step + step) % vocabulary for step in (5, 11, 3))
    ids = torch.stack([torch.cat([first, second]), torch.cat([other_first, second])])

    def change(**position_ids: Tensor) -> Tensor:
        """Return how much the logits of the second document change with the first one."""
        parts = ids.split(min(rows, 2))
        positions = {name: value.expand_as(parts[0]) for name, value in position_ids.items()}
        logits = torch.cat([model(input_ids=part, **positions).logits for part in parts])[:, LENGTH:].float()
        return (logits[0] - logits[1]).abs().max()

    separate = change(position_ids=count.repeat(2))
    return not bool(separate <= SHARE * change())
