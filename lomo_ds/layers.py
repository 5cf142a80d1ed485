"""Which decoder layer a parameter belongs to, read from its name."""

import re


def layer_of(name: str) -> str | None:
    """The outermost numbered module on a parameter's path (``model.layers.7``); None outside the layers."""
    match = re.match(r"(?:.+?\.)?\d+(?=\.)", name)
    return match.group() if match else None
