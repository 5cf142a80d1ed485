"""Dataset formats: what a row means, detected by its columns and read into an example.

An example is a plain text, a prompt with its completion, a conversation, or tokens with their labels.
"""

from lomo_ds.data.formats.examples import IGNORE_INDEX, KINDS, Chat, Completion, Example, Text, Tokens, is_empty
from lomo_ds.data.formats.parse_row import TEXT_FIELD, Format, detect_format, parse_row

__all__ = [
    "IGNORE_INDEX",
    "KINDS",
    "TEXT_FIELD",
    "Chat",
    "Completion",
    "Example",
    "Format",
    "Text",
    "Tokens",
    "detect_format",
    "is_empty",
    "parse_row",
]
