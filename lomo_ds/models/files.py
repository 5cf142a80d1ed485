"""The weight files of a Hugging Face folder: which tensors they hold, and any piece of one, read alone."""

import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lomo_ds.errors import ModelError

CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}')\""
)


class WeightFiles:
    """Tensors in ``model.safetensors``, in its parts with their index, or in ``pytorch_model*.bin``.

    Attributes:
        shapes: of each tensor, by name.

    Raises:
        ModelError: there are none, or one of them is not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of: dict[str, Path] = {}
        self._mapped: tuple[Path | None, dict[str, Tensor]] = (None, {})  # the .bin file that was read from last
        for file in _weight_files(folder):
            found = self._shapes_in(file)
            self.shapes |= found
            self._file_of |= dict.fromkeys(found, file)

    def copy_piece(self, name: str, start: int, out: Tensor) -> None:
        """Fill ``out`` (1-D, any dtype and device) from element ``start`` of the flattened tensor on.

        The file is mapped, so that only these bytes of it are read, and let go of again.

        Raises:
            ModelError: the file cannot be read.
        """
        file, shape, stop = self._file_of[name], self.shapes[name], start + out.numel()
        if not out.numel():
            return
        if file.suffix == ".bin":
            out.copy_(self._tensors_in(file)[name].reshape(-1)[start:stop])
            return
        with _reading(file), safe_open(file, framework="pt") as opened:
            if not shape:
                out.copy_(opened.get_tensor(name).reshape(1))
                return
            row = math.prod(shape[1:])
            first, last = start // row, -(-stop // row)
            rows = opened.get_slice(name)[first:last]
            out.copy_(rows.reshape(-1)[start - first * row : stop - first * row])

    def _shapes_in(self, file: Path) -> dict[str, tuple[int, ...]]:
        if file.suffix == ".bin":
            return {name: tuple(tensor.shape) for name, tensor in self._tensors_in(file).items()}
        with _reading(file), safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118

    def _tensors_in(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a .bin file, mapped; nothing else can be in it, and no code of its pickle runs."""
        if self._mapped[0] != file:
            with _reading(file):
                self._mapped = (file, torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        return self._mapped[1]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} holds more than tensors, which nothing here unpickles: {first_line(error)}; use safetensors"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {first_line(error)}") from None
    except (RuntimeError, EOFError, AttributeError) as error:
        raise ModelError(
            f"{file} is not a whole file of torch.save's zip format: {first_line(error)}; if it is older, convert it "
            f"with `{CONVERT.format(folder=file.parent)}`"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return _indexed(index)
        if (folder / whole).is_file():
            return [folder / whole]
    raise ModelError(
        f"a model folder must hold model.safetensors or pytorch_model.bin, or its parts and their index, got {folder}, "
        "which has none"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        files = sorted(
            {index.parent / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index} is not an index of weight files: {first_line(error)}") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index} names {some(missing)}, which {index.parent} does not hold; copy or download it whole"
        )
    return files


def some(names: list[str], at_most: int = 10) -> str:
    """The first of ``names``, and how many more there are."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """What an exception of a library says, short enough for a sentence of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
