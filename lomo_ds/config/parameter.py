"""Fields that describe a run: each has a default, a help text and bounds, and one function validates them all."""

import dataclasses
import re
import sys
import types
from dataclasses import MISSING, field
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lomo_ds.errors import ConfigError


def parameter(
    default: Any = MISSING,
    help: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    multiline: bool = False,
    lomo: bool = False,
) -> Any:
    """Define a dataclass field; without a default it is required.

    Args:
        help: text for ``--help``.
        at_least, above, at_most: bounds of a number.
        multiline: whether a text may have several lines.
        lomo: whether it is a parameter of the optimizers that update during backward, which a DeepSpeed config has in
            ``optimizer.params``.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most}
    metadata = {"help": help, "multiline": multiline, "lomo": lomo, **bounds}
    return field(default=default, metadata=metadata)


def lomo_parameter(default: Any = MISSING, help: str = "", **bounds: float) -> Any:
    """Define a field that is a parameter of ``optimizer.params``; see ``parameter``."""
    return parameter(default, help, lomo=True, **bounds)  # type: ignore[arg-type]


def validate_fields(instance: Any, prefix: str) -> None:
    """Validate every field of a dataclass against its type and bounds.

    Args:
        prefix: what precedes a field's name in an error message, ``--`` for example.

    Raises:
        ConfigError: a value breaks its rule.
    """
    hints = get_type_hints(type(instance))
    for entry in dataclasses.fields(instance):
        validate_value(getattr(instance, entry.name), hints[entry.name], prefix + entry.name, **entry.metadata)


def validate_value(value: Any, hint: Any, name: str, **rules: Any) -> None:
    """Validate one value; see ``parameter`` for ``rules``.

    Args:
        hint: its type: ``int``, ``float``, ``bool``, ``str``, a ``Literal``, a list of one of these, or ``| None``.

    Raises:
        ConfigError: the value breaks its rule.
    """
    if value is None and type(None) in get_args(hint):
        return
    hint = _without_none(hint)
    if get_origin(hint) is Literal:
        _require(value in get_args(hint), name, f"one of {', '.join(map(str, get_args(hint)))}", value)
    elif get_origin(hint) is list:
        _require(isinstance(value, list) and bool(value), name, "a list of at least one value", value)
        for item in value:
            validate_value(item, get_args(hint)[0], name, **rules)
    elif hint in (int, float):
        _validate_number(value, hint, name, rules)
    elif hint is bool:
        _require(isinstance(value, bool), name, "true or false", value)
    elif hint is str:
        _validate_text(value, name, rules.get("multiline", False))


def base_type(hint: Any) -> type:
    """Return the type of a field's values beside None; ``str`` for a ``Literal``."""
    kind = _without_none(hint)
    return str if get_origin(kind) is Literal else kind


def _without_none(hint: Any) -> Any:
    is_union = get_origin(hint) in (Union, types.UnionType)
    return next(kind for kind in get_args(hint) if kind is not type(None)) if is_union else hint


def _validate_number(value: Any, kind: type, name: str, rules: dict[str, Any]) -> None:
    at_least, above, at_most = (rules.get(bound) for bound in ("at_least", "above", "at_most"))
    rule = "an integer" if kind is int else "a number"
    if at_least is not None and at_most is not None:
        rule += f" between {at_least:g} and {at_most:g}"
    elif at_least is not None:
        rule += f" of at least {at_least:g}"
    elif above is not None:
        rule += f" above {above:g}" + ("" if at_most is None else f" and at most {at_most:g}")
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    _require(is_number and abs(value) <= sys.float_info.max, name, rule, value)
    if kind is int:
        _require(-(2**63) <= value < 2**63, name, "an integer of at most 64 bits", value)
    _require(at_least is None or value >= at_least, name, rule, value)
    _require(above is None or value > above, name, rule, value)
    _require(at_most is None or value <= at_most, name, rule, value)


def _validate_text(value: Any, name: str, multiline: bool) -> None:
    _require(isinstance(value, str), name, "a text", value)
    _require(not re.search("[\ud800-\udfff]", value), name, "Unicode text", value)
    is_one_line = "\0" not in value and len(value.splitlines()) <= 1
    _require(is_one_line or multiline, name, "one line of text without NUL bytes", value)


def _require(holds: bool, name: str, rule: str, value: Any) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}")
