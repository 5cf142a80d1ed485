"""The special tokens that end samples: a model stops where it has learnt to produce one."""

from transformers import PreTrainedTokenizerBase

from lomo_ds.data.formats import IGNORE_INDEX
from lomo_ds.data.samples import Positions, Samples

SAMPLED = 100  # samples that are looked at


def end_tokens(samples: Samples, chosen: Positions, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """Return the ids of the special tokens that end the labels of the first ``chosen`` samples, each id once.

    White space may follow such a token. None is among them if the labels of a sample end with another token.
    """
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ends = (_end_token(samples, index, special, tokenizer) for index in chosen[:SAMPLED])
    return list(dict.fromkeys(end for has_labels, end in ends if has_labels))


def _end_token(
    samples: Samples, index: int, special: set[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[bool, int | None]:
    """Return whether a sample has labels, and the special token that ends them."""
    labels = samples.labels[samples.starts[index] : samples.starts[index + 1]]
    trained = labels[labels != IGNORE_INDEX].tolist()
    for number in reversed(trained):
        if number in special:
            return True, number
        if tokenizer.decode([number]).strip():
            break
    return bool(trained), None
