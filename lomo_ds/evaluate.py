"""What a model can do: its held-out loss over all ranks, and a text it continues."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lomo_ds.distributed import agree
from lomo_ds.loss import count_items, loss_of, shifts_labels
from lomo_ds.training_engine import TrainingEngine


@torch.no_grad()
def evaluate_loss(
    engine: TrainingEngine, batches: Iterable[dict[str, Tensor]], interrupted: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean loss in nats per token over every rank's labelled tokens; each rank brings equally many batches.

    Args:
        interrupted: asked before each batch, with the same answer on every rank; True ends it with None.
    """
    training = engine.module.training
    engine.eval()
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # loss times tokens, tokens
    shifts = shifts_labels(engine.module)
    for batch in batches:
        if interrupted():
            engine.train(training)
            return None
        items = count_items(batch, shifts)
        loss = loss_of(engine(**{name: value.to(engine.device) for name, value in batch.items()}))
        if items:
            total += torch.stack([loss.double() * items, torch.full_like(loss, items, dtype=torch.float64)])
    engine.train(training)
    summed, tokens = agree(total, engine.seq_data_parallel_group).tolist()
    return summed / tokens


@torch.no_grad()
def continue_text(engine: TrainingEngine, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """``prompt`` and the model's greedy continuation of it; every rank takes part, with the same result."""
    training = engine.module.training
    engine.eval()
    inputs = tokenizer(prompt, return_tensors="pt").to(engine.device)
    output = engine.module.generate(
        **inputs, max_new_tokens=tokens, do_sample=False, synced_gpus=True, pad_token_id=tokenizer.eos_token_id
    )
    engine.train(training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))
