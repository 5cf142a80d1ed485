"""Evaluation of a model: the held-out loss over all ranks, and the continuation of a prompt."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lomo_ds.distributed.collectives import all_reduce_sum
from lomo_ds.engine.items import Count, LabelObserver, count_sums, total_items
from lomo_ds.engine.protocol import TrainingEngine
from lomo_ds.engine.step_batch import StepBatch


@torch.no_grad()
def evaluate_loss(
    engine: TrainingEngine, batches: Iterable[dict[str, Tensor]], interrupted: Callable[[], bool] = lambda: False
) -> float | None:
    """Return the mean loss, in nats per token, over the labelled tokens of all ranks; None if interrupted.

    Args:
        batches: equally many on each rank.
        interrupted: called before each batch, with the same result on every rank; True stops the evaluation.
    """
    training = engine.module.training
    label_observer = LabelObserver(engine.module)
    engine.eval()
    try:
        total = torch.zeros(1, dtype=torch.float64, device=engine.device)  # sum of loss x items
        counts: list[Count] = []
        for batch in batches:
            if interrupted():
                return None
            step_batch = StepBatch(batch, None, label_observer, engine.device, engine.seq_data_parallel_group)
            loss = step_batch.forward_loss(engine, 0)
            counts += step_batch.counts
            if counts[-1].items:
                total += loss.double() * counts[-1].items
    finally:
        label_observer.remove()
        engine.train(training)
    sums = torch.tensor(count_sums(counts), dtype=torch.float64).to(engine.device)
    loss_sum, *count_totals = all_reduce_sum(torch.cat([total, sums]), engine.seq_data_parallel_group).tolist()
    return loss_sum / total_items(count_totals)


def continue_text(engine: TrainingEngine, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """Return ``prompt`` with the model's greedy continuation; every rank takes part and gets the same text."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return str(tokenizer.decode(_generate(engine, tokenizer, ids, tokens), skip_special_tokens=True))


def answer(engine: TrainingEngine, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    """Return the model's greedy answer to ``question``, a user's message; every rank takes part, as above."""
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = prompt["input_ids"]
    generated = _generate(engine, tokenizer, ids, tokens)
    return str(tokenizer.decode(generated[ids.shape[1] :], skip_special_tokens=True))


@torch.no_grad()
def _generate(engine: TrainingEngine, tokenizer: PreTrainedTokenizerBase, ids: Tensor, tokens: int) -> Tensor:
    """Return the ids of the prompt, (1, length), and of at most ``tokens`` more; 1-D."""
    training = engine.module.training
    engine.eval()
    ids = ids.to(engine.device)
    output = engine.module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        synced_gpus=True,
        pad_token_id=tokenizer.eos_token_id,
    )
    engine.train(training)
    return output[0]
