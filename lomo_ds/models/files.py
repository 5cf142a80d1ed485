"""The weight files of a Hugging Face folder: an index of their tensors, and reads of any piece of a tensor."""

import json
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lomo_ds.errors import ModelError, one_line
from lomo_ds.models.sources import Stored

# safetensors' names of the dtypes of weights and buffers
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # dtypes of quantized weights, which are rejected later with an error message that names them
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
QUANTIZATION = "quantization_config"  # section of config.json
WHOLE = ("model.safetensors", "pytorch_model.bin")
MAX_HEADER = 100_000_000  # bytes; safetensors rejects files with longer headers

CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{folder}').save_pretrained('{folder}')\""
)


class WeightFiles:
    """The tensors in ``model.safetensors`` or ``pytorch_model.bin``, or in the parts that their index names.

    Attributes:
        sources: the stored tensors, keyed by name.

    Raises:
        ModelError: there are no weight files, or one of them is incomplete.
    """

    def __init__(self, folder: Path) -> None:
        self.sources: dict[str, Stored] = {}
        self._mapped: tuple[Path | None, dict[str, Tensor]] = (None, {})  # the last used .bin file
        for file in _weight_files(folder):
            self.sources |= self._pickled_in(file) if file.suffix == ".bin" else _safetensors_in(file)

    def _pickled_in(self, file: Path) -> dict[str, Stored]:
        def copy_piece(name: str, start: int, out: Tensor) -> None:
            out.copy_(self._tensors_in(file)[name].reshape(-1)[start : start + out.numel()])

        return {
            name: Stored(tensor.shape, tensor.dtype, name, partial(copy_piece, name))
            for name, tensor in self._tensors_in(file).items()
        }

    def _tensors_in(self, file: Path) -> dict[str, Tensor]:
        """Map the tensors of a .bin file; other objects are rejected, and no code of its pickle runs."""
        if self._mapped[0] != file:
            with _reading(file):
                tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
                    raise pickle.UnpicklingError("it is not a dictionary of tensors")
                self._mapped = (file, tensors)
        return self._mapped[1]


def _safetensors_in(file: Path) -> dict[str, Stored]:
    with _reading(file):
        data, header = _header(file)
    sources = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ModelError(f"{name} in {file} must be one of {', '.join(DTYPES)}, got {entry['dtype']}")
        dtype, begin = DTYPES[entry["dtype"]], data + entry["data_offsets"][0]
        sources[name] = Stored(torch.Size(entry["shape"]), dtype, name, partial(_copy_piece, file, dtype, begin))
    return sources


def _copy_piece(file: Path, dtype: torch.dtype, begin: int, start: int, out: Tensor) -> None:
    """Fill ``out`` from element ``start`` of the tensor that begins at byte ``begin`` of ``file``.

    Only these bytes are read, directly into ``out`` if that is host memory of their dtype.

    Raises:
        ModelError: the file cannot be read.
    """
    if not out.numel():
        return
    direct = out.device.type == "cpu" and out.dtype == dtype
    piece = out if direct else torch.empty(out.numel(), dtype=dtype)
    with _reading(file):
        _read(file, begin + start * dtype.itemsize, piece)
    if piece is not out:
        out.copy_(piece)


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Return the offset of the tensor data in a safetensors file and its header, checked by safetensors."""
    with _opened(file) as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = opened.read(min(length, MAX_HEADER))
    with safe_open(file, framework="pt"):  # checks the header; opened last, because it reads ahead in uncached files
        entries = json.loads(header)
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _read(file: Path, begin: int, out: Tensor) -> None:
    """Fill ``out`` with the bytes of a file from ``begin`` on."""
    left = out.view(torch.uint8).numpy().data
    with _opened(file) as opened:
        opened.seek(begin)
        while left:
            count = opened.readinto(left)
            if not count:
                raise OSError(f"it ends {len(left)} bytes early")
            left = left[count:]


def _opened(file: Path) -> FileIO:
    """Open a file for reading pieces of it, without the kernel's readahead into pieces of other ranks.

    In a mapped file, as safetensors uses it, the kernel reads ahead by megabytes around every piece.
    """
    opened = FileIO(file)
    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return opened


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{file} must hold only tensors, other pickled objects are not loaded: {first_line(error)}; use safetensors"
        ) from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {first_line(error)}") from None
    except (RuntimeError, EOFError, AttributeError) as error:
        raise ModelError(
            f"{file} is not a whole file of torch.save's zip format: {first_line(error)}; if it is older, convert it "
            f"with `{CONVERT.format(folder=file.parent)}`"
        ) from None


def quantization_method(folder: Path) -> str | None:
    """Return the quantization method in a folder's configuration, or None if it has none."""
    try:
        section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(QUANTIZATION)
        return str(section.get("quant_method") or "unknown method") if section else None
    except (OSError, ValueError, AttributeError):
        return None


def has_weights(folder: Path) -> bool:
    """Return whether a folder holds weight files, complete or not."""
    return any((folder / f"{whole}{ending}").is_file() for whole in WHOLE for ending in ("", ".index.json"))


def adapter_hint(folder: Path) -> str:
    """Return advice for an error message if a folder holds a LoRA adapter, else an empty string."""
    if not (folder / "adapter_config.json").is_file():
        return ""
    return "; it holds a LoRA adapter: merge it into its model first, with merge_and_unload and save_pretrained of peft"


def _weight_files(folder: Path) -> list[Path]:
    for whole in WHOLE:
        index = folder / f"{whole}.index.json"
        if index.is_file():
            return _files_in_index(index)
        if (folder / whole).is_file():
            return [folder / whole]
    raise ModelError(
        f"a model folder must hold model.safetensors or pytorch_model.bin, or its parts and their index, got {folder}, "
        f"which has none{adapter_hint(folder)}"
    )


def _files_in_index(index: Path) -> list[Path]:
    try:
        files = sorted(
            {index.parent / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(f"{index} is not an index of weight files: {first_line(error)}") from None
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{index} names {summarize_names(missing)}, which {index.parent} does not hold; copy or download it whole"
        )
    return files


def summarize_names(names: list[str], at_most: int = 10) -> str:
    """Return the first of ``names``, and the number of remaining ones."""
    more = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {more} more" if more > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of a library's exception, for use within an error message."""
    lines = str(error).strip().splitlines() or [""]
    line = " ".join([lines[0], *(lines[1:2] if lines[0].endswith(":") else [])])
    named = isinstance(error, LookupError | ArithmeticError | AssertionError | TypeError) or not line
    return f"{type(error).__name__}: {one_line(line)}".removesuffix(": ") if named else one_line(line)
