"""Small tokenizers of every kind, built within a test."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

MARKS: dict[str, str] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CORPUS = ["the quick brown fox jumps over the lazy dog, twice\n" * 3, "one  two\n\n three 1234567 été 中文 \U0001f600"]


class Letters:
    """A tokenizer in Python whose tokens are characters, the begin 0 and the end 1."""

    bos_token_id = 0
    eos_token_id = 1
    unk_token_id = None
    is_fast = False
    calls = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.calls += 1
        return {"input_ids": [ord(letter) for letter in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(128)}

    def convert_ids_to_tokens(self, number: int) -> str:
        return chr(number)

    def save_pretrained(self, folder: Path) -> None:
        """Do nothing: there are no settings."""


def byte_level() -> PreTrainedTokenizerFast:
    """Build a tokenizer like that of GPT-2, LLaMA-3 and Qwen: split into words, then BPE of their bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def without_words() -> PreTrainedTokenizerFast:
    """Build a tokenizer like that of LLaMA and Gemma: BPE of the entire text with a space added in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    trainer = trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **MARKS)


def unigram() -> PreTrainedTokenizerFast:
    """Build a tokenizer like that of T5 and XLNet: Unigram after a normalizer that changes the text's length."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **MARKS)


KINDS = {"byte level": byte_level, "without words": without_words, "unigram": unigram}
