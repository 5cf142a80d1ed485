"""The datasets of a job: packing by default and by request, held-out rows, mixtures, and what is said about them."""

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.data import Mixture, PackedSequences, Sequences
from lomo_ds.errors import ConfigError, DataError
from lomo_ds.models import set_chat_template
from lomo_ds.train.datasets import Datasets, load_datasets
from tests.data.datasets import write_jsonl
from tests.data.tokenizers import byte_level

ROWS = [{"prompt": f"{number} " * (number + 1), "completion": "the end"} for number in range(20)]
WORDS = 10**4  # more rows than any embedding here needs


def arguments(folder: Path, *files: Path, **more: Any) -> TrainArguments:
    return TrainArguments(
        **{
            "model_name_or_path": "m", "train_file": [str(file) for file in files], "output_dir": str(folder),
            "max_seq_length": 64, **more,
        }
    )  # fmt: skip


def datasets(folder: Path, *files: Path, **more: Any) -> Datasets:
    return load_datasets(arguments(folder, *files, **more), byte_level(), WORDS)


def texts(sequences: Sequences, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return sorted(
        tokenizer.decode(sequences[index]["input_ids"][: sequences.sizes[index]], skip_special_tokens=True)
        for index in range(len(sequences))
    )


@pytest.mark.parametrize(
    ("given", "of_texts", "of_others"),
    [
        ({}, "wrapped", "none"),
        ({"packing": True}, "wrapped", "bfd"),
        ({"packing": False}, "none", "none"),
        ({"packing_strategy": "bfd_split"}, "bfd_split", "bfd_split"),
        ({"packing": True, "packing_strategy": "wrapped"}, "wrapped", "wrapped"),
    ],
)
def test_plain_texts_alone_are_packed_by_default(given: dict[str, Any], of_texts: str, of_others: str) -> None:
    run = arguments(Path("out"), Path("a.jsonl"), **given)
    assert (run.packing_strategy_of(is_text=True), run.packing_strategy_of(is_text=False)) == (of_texts, of_others)


def test_a_share_of_the_rows_is_held_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ROWS)
    tokenizer = byte_level()
    split = {"validation_split_percentage": 20}
    held_out = datasets(tmp_path, file, **split)
    assert isinstance(held_out.validation, PackedSequences)
    training, validation = texts(held_out.training, tokenizer), texts(held_out.validation, tokenizer)
    assert (len(training), len(validation)) == (16, 4)
    everything = texts(datasets(tmp_path, file).training, tokenizer)
    assert sorted(training + validation) == everything
    again = datasets(tmp_path, file, seed=7, **split).validation
    assert again is not None
    assert texts(again, tokenizer) != validation, "the seed decides which"


def test_a_share_needs_rows_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one long text")
    with pytest.raises(DataError, match=r"holds out 0 of the 1 samples of .*a\.txt, .*; give a --validation_file"):
        datasets(tmp_path, tmp_path / "a.txt", validation_split_percentage=20)


def test_files_with_weights_are_a_mixture(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the", "completion": "dog"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "the quick brown fox"}])
    together = datasets(tmp_path, first, second)
    assert len(together.training) == 2
    mixture = datasets(tmp_path, first, second, train_file_weights=[3.0, 1.0]).training
    assert isinstance(mixture, Mixture)
    assert texts(mixture, byte_level()) == ["the quick brown fox"] + ["thedog"] * 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train_file_weights": [1.0, 2.0]}, "--train_file_weights must be one number for each --train_file, got 2 fo"),
        ({"train_file_weights": [0.0]}, "--train_file_weights must be a number above 0, got 0.0"),
        ({"validation_file": ["v.jsonl"], "validation_split_percentage": 5}, "both say what is held out"),
        ({"train_on_prompt": True, "assistant_only_loss": True}, "--train_on_prompt and --assistant_only_loss contrad"),
        ({"packing": False, "packing_strategy": "bfd"}, "--packing_strategy bfd was given with --packing false"),
        ({"validation_split_percentage": 100}, "must be an integer between 0 and 99, got 100"),
    ],
)
def test_arguments_that_contradict_each_other(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        arguments(Path("out"), Path("a.jsonl"), **given)


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs: list[Any] = [("the " * 40, "end"), ("the", "dog " * 50), (" ", ""), (3, "x"), ("the", "fox")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    for _ in range(2):  # from the file, and from the cache
        caplog.clear()
        with caplog.at_level(logging.INFO, "lomo_ds"):
            datasets(tmp_path, file, max_seq_length=32, on_bad_rows="skip", packing=True)
        said = "\n".join(message.removeprefix(f"{file}: ") for message in caplog.messages)
        assert "1 of 5 rows are malformed and left out, the first: " in said
        assert "line 4: 'prompt' must be text, got int 3" in said
        assert "1 of 5 rows are empty and left out" in said
        assert "2 of 3 samples are longer than --max_seq_length 32 and cut off, by" in said
        assert "1 of 3 samples have nothing to learn within --max_seq_length and are left out, with" in said
        assert "trains on 2 samples, " in said
        assert "% padding)" in said
        assert "(packing bfd, " in said


def test_a_template_without_an_end_of_answers_is_refused(tmp_path: Path) -> None:
    """A model that is trained on it would not learn to stop."""
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat}])
    tokenizer = byte_level()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    with pytest.raises(DataError, match="ends an answer with no special token, so the model would not learn to stop"):
        load_datasets(arguments(tmp_path, file), tokenizer, WORDS)


def test_texts_and_conversations_of_one_run(tmp_path: Path) -> None:
    """Texts are one stream, conversations are not packed; generation stops at the end of answers and of texts."""
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "a.txt").write_text("the quick brown fox " * 20)
    chats = write_jsonl(tmp_path / "b.jsonl", [chat])
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_chat_template(tokenizer, "chatml")
    for more in ({}, {"train_file_weights": [0.5, 1.0]}):
        run = arguments(tmp_path, tmp_path / "a.txt", chats, max_seq_length=32, **more)
        loaded = load_datasets(run, tokenizer, WORDS)
        ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "</s>")]
        assert set(loaded.end_tokens) == set(ends)
        assert loaded.has_chats
        assert isinstance(loaded.training, Mixture)
        texts, others = loaded.training.parts
        assert isinstance(texts, PackedSequences)
        assert isinstance(others, PackedSequences)
        assert (texts.strategy, texts.losses.cut_samples, others.strategy) == ("wrapped", 0, "none")


def test_a_dataset_with_nothing_to_learn(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "the " * 40, "completion": "end"}])
    with pytest.raises(DataError, match=r"nothing to learn: none of 1 samples .* the first 16 tokens; give a larger"):
        datasets(tmp_path, file, max_seq_length=16)


@pytest.mark.parametrize(("length", "most"), [(512, 0.02), (1024, 0.02), (2048, 0.02)])
def test_padding_of_packed_conversations(assets: Path, tmp_path: Path, length: int, most: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "llama_tokenizer")
    set_chat_template(tokenizer, None)
    run = arguments(tmp_path, assets / "instruct/alpaca_999.json", max_seq_length=length, packing=True)
    sequences = load_datasets(run, tokenizer, rows=32000).training
    assert isinstance(sequences, PackedSequences)
    assert sequences.padding < most
