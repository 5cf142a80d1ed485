"""Training examples: what a row of a dataset means, before it is tokenized."""

from dataclasses import dataclass, field
from typing import Any

IGNORE_INDEX = -100  # label that the loss ignores, as in torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Text:
    """A plain text, every token of which is trained."""

    text: str


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that continues it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation, to be rendered by the tokenizer's chat template.

    Attributes:
        messages: OpenAI's form: ``role``, ``content``, and perhaps ``tool_calls`` and more for the template.
        tools: JSON schemas of the functions that the assistant may call.
        template_arguments: further arguments of the chat template.
        prompt_length: number of messages that are the prompt of the others; None if the assistant's are the answers.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    prompt_length: int | None = None


@dataclass(frozen=True)
class Tokens:
    """Token ids and their labels, of equal length; -100 is the label of a token that is not trained."""

    ids: list[int]
    labels: list[int]


Example = Text | Completion | Chat | Tokens
KINDS: tuple[type[Example], ...] = (Text, Completion, Chat, Tokens)  # stored by their positions here


def is_empty(example: Example) -> bool:
    """Return whether there is nothing in ``example``: no message, no token, or white space alone."""
    match example:
        case Text():
            return not example.text.strip()
        case Completion():
            return not (example.prompt + example.completion).strip()
        case Chat():
            return not any(message["content"].strip() or message.get("tool_calls") for message in example.messages)
    return not example.ids
