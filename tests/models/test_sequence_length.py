"""The length of training sequences: its default, and the requests that a model does not allow."""

import logging

import pytest
from transformers import BloomConfig, LlamaConfig

from lomo_ds.errors import ConfigError
from lomo_ds.models import sequence_length


@pytest.mark.parametrize(("positions", "length"), [(131_072, 2048), (2048, 2048), (128, 128)])
def test_the_default_is_the_models_limit_and_2048_at_most(
    caplog: pytest.LogCaptureFixture, positions: int, length: int
) -> None:
    config = LlamaConfig(max_position_embeddings=positions)
    with caplog.at_level(logging.INFO, "lomo_ds"):
        assert sequence_length(config, None) == length
    assert f"--max_seq_length was not given: {length}, where the model has {positions} positions" in caplog.text


def test_a_requested_length_must_be_within_the_models_limit() -> None:
    config = LlamaConfig(max_position_embeddings=4096)
    assert sequence_length(config, 4096) == 4096
    with pytest.raises(ConfigError, match="use at most 4096"):
        sequence_length(config, 4097)


def test_a_model_without_a_position_limit() -> None:
    with pytest.raises(ConfigError, match="give --max_seq_length"):
        sequence_length(BloomConfig(), None)
    assert sequence_length(BloomConfig(), 9000) == 9000
