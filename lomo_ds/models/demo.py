"""Generated inputs of ``make train``: a corpus, a tokenizer trained on it, and a tiny LLaMA with random weights."""

import io
import json
import random
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 512
POSITIONS = 128

_ANIMALS = ["fox", "hen", "cat", "owl", "dog", "bear", "mouse", "goat", "duck", "frog"]
_NAMES = ["Anna", "Ben", "Cleo", "Dan", "Ella", "Finn", "Gina", "Hugo"]
_MOODS = ["happy", "tired", "hungry", "brave", "shy", "curious", "lonely", "proud"]
_PLACES = ["by the river", "in the old barn", "under the oak", "on the hill", "near the mill", "behind the red house"]
_THINGS = ["a shiny key", "a lost bell", "a warm blanket", "a basket of plums", "a paper boat", "a wooden drum"]
_DEEDS = ["shared it with", "gave it to", "showed it to", "hid it from", "carried it home to"]
_ENDINGS = [
    "They laughed until the sun went down.",
    "And from that day on they were friends.",
    "Then it began to rain and they ran home.",
    "Nobody ever found out why.",
]


def make_demo(folder: Path, seed: int = 0) -> None:
    """Write ``train.txt``, ``validation.txt`` and ``model/`` to ``folder``, byte-equal for equal ``seed``."""
    model_folder = folder / "model"
    model_folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for name, stories in (("train.txt", 4000), ("validation.txt", 200)):
        (folder / name).write_text("\n".join(_story(rng) for _ in range(stories)) + "\n", encoding="utf-8")
    _train_tokenizer(folder / "train.txt", model_folder)
    _write_random_model(model_folder, seed)


def _story(rng: random.Random) -> str:
    name, animal, mood = rng.choice(_NAMES), rng.choice(_ANIMALS), rng.choice(_MOODS)
    thing = rng.choice(_THINGS)
    return (
        f"One day a {mood} {animal} called {name} found {thing} {rng.choice(_PLACES)}. "
        f"{name} was so {mood} that the {animal} {rng.choice(_DEEDS)} a {rng.choice(_ANIMALS)}. "
        f"{rng.choice(_ENDINGS)}"
    )


def _train_tokenizer(text: Path, folder: Path) -> None:
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.read_text(encoding="utf-8").splitlines()),  # a path would become part of the model
        model_writer=trained,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        num_threads=1,  # with several threads, the order of pieces is not deterministic
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _write_random_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
