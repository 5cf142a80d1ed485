"""Decoding of rows from JSON text, with error messages that name the line and column of each fault."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lomo_ds.data.rows.row_file import not_utf8
from lomo_ds.errors import BadRowError

DECODER = json.JSONDecoder()
SPACE = re.compile(r"[ \t\n\r]*")
# a string without an end stops at the end of its line, since no string has a line break
STRING = r'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"?'
BRACKET = re.compile(rf"{STRING}|[][{{}}]")
CLOSING = {"[": "]", "{": "}"}
END_OF_ROW = re.compile(r"\s*(?:\]|,\s*\n([ \t]*)\{)")
NAMES = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}


@dataclass(frozen=True)
class JsonText:
    """Text of a JSON file, or of one of its lines.

    Attributes:
        text: decoded by ``row_file.decode``.
        first_line: number, in the file, of the first line of ``text``.
    """

    path: Path
    text: str
    first_line: int = 1

    def skip_space(self, position: int) -> int:
        """Return the position of the first character that is not white space, from ``position`` on."""
        match = SPACE.match(self.text, position)
        return match.end() if match else position

    def line(self, position: int) -> str:
        """Return the path and the number of the line at ``position``, with which an error message begins."""
        return f"{self.path} line {self.first_line + self.text.count(chr(10), 0, position)}"

    def column(self, position: int) -> int:
        """Return the number of the character at ``position`` in its line; the first is 1."""
        return position - self.text.rfind("\n", 0, position)

    def fault(self, position: int, reason: str) -> str:
        """Return an error message: the text is not JSON at ``position``, or a byte of that line is not UTF-8."""
        column = self.column(position)
        line_end = self.text.find("\n", position)
        line = self.text[position - column + 1 : line_end if line_end >= 0 else None]
        return f"{self.line(position)} {not_utf8(line) or f'is not valid JSON: {reason} at column {column}'}"

    def decode(self, start: int) -> tuple[Any, int]:
        """Return the JSON value at ``start``, and the position of its end.

        Raises:
            BadRowError: there is no valid JSON value, or it is nested too deep.
        """
        try:
            return DECODER.raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            raise BadRowError(self.fault(error.pos, error.msg)) from None
        except RecursionError:
            raise BadRowError(f"{self.line(start)} is nested too deep to be read") from None
        except ValueError:  # int() refuses so many digits, for which it takes long; no column needs such a number
            return json.JSONDecoder(parse_int=float).raw_decode(self.text, start)

    def check_row(self, value: Any, start: int, end: int) -> dict[str, Any]:
        """Return ``value``, decoded from ``start`` to ``end``, if it is an object in UTF-8.

        Raises:
            BadRowError: it is not.
        """
        if not isinstance(value, dict):
            raise BadRowError(
                f'{self.line(start)} must be an object such as {{"text": "..."}}, got {NAMES[type(value)]}'
            )
        try:
            self.text[start:end].encode()
        except UnicodeEncodeError as error:
            raise BadRowError(self.fault(start + error.start, "not UTF-8")) from None
        return value

    def end_of_malformed(self, start: int) -> int | None:
        """Return the end of the malformed object at ``start`` in an array, or None if it is not certain.

        It is certain where the brackets match and the array ends, or the next object begins on a line of its own with
        the same indentation: a line break is never inside a string, so a lost quotation mark cannot hide it.
        """
        opened: list[str] = []
        for match in BRACKET.finditer(self.text, start):
            if match[0] in CLOSING:
                opened.append(CLOSING[match[0]])
            elif match[0] in CLOSING.values() and (not opened or opened.pop() != match[0]):
                return None
            if not opened:
                return match.end() if self._ends_row(start, match.end()) else None
        return None

    def _ends_row(self, start: int, end: int) -> bool:
        following = END_OF_ROW.match(self.text, end)
        indentation = self.text[self.text.rfind("\n", 0, start) + 1 : start]
        is_alone = not indentation.strip()  # else the row stands behind the array's bracket, or another row
        return following is not None and (not is_alone or following[1] in (None, indentation))
