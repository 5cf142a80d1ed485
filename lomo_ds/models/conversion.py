"""Conversion of the tensors in a model folder to those of the model, by transformers' own rules, without reading them.

transformers defines renamed keys, prefixes, merged experts and ties. Here they are applied to lazy tensors.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo

from lomo_ds.errors import ModelError
from lomo_ds.models.files import WeightFiles, quantization_method, summarize_names
from lomo_ds.models.lazy_tensor import LazyTensor
from lomo_ds.models.meta_model import saved_buffers, saved_tensors
from lomo_ds.models.sources import Source, stored_names

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = "the model in {folder} is quantized ({method}); full fine-tuning needs its original weights"
QUANTIZED_NAMES = re.compile(r"\.(qweight|qzeros|scales|absmax|weight_scale|weight_scale_inv|weight_packed)$")
# a buffer of older releases, in addition to those that transformers itself ignores
OBSOLETE = re.compile(r"\.masked_bias$")


def find_sources(model: PreTrainedModel, folder: Path) -> dict[str, Source]:
    """Return the source of each parameter and saved buffer of a meta model, keyed by name.

    Afterwards, parameters are tied as if transformers had loaded the folder: tied ones whose stored values differ are
    untied.

    Raises:
        ModelError: tensors are missing, unexpected, of another shape, quantized, or cannot be converted.
    """
    tensors = {name: LazyTensor(source) for name, source in WeightFiles(folder).sources.items()}
    mapping = get_model_conversion_mapping(model)
    with _without_progress_bar():
        report, _ = convert_and_load_state_dict_in_model(
            model, tensors, LoadStateDictConfig(dtype=model.dtype, weight_mapping=mapping)
        )
        model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(report)
    parameters = dict(model.named_parameters())
    sources = {
        name: tensor.source
        for name, tensor in [*parameters.items(), *saved_buffers(model).items()]
        if isinstance(tensor, LazyTensor)
    }
    _check_not_quantized(
        folder, [tensors[stored] for name in parameters for stored in _stored_names_of(sources.get(name))]
    )
    without_source = [name for name in parameters if name not in sources or name in report.missing_keys]
    _check_names_and_shapes(folder, report, without_source)
    _put_on_meta(model)
    return sources


def find_text_sources(model: PreTrainedModel, multimodal: PreTrainedModel, folder: Path) -> dict[str, Source]:
    """Do the same as ``find_sources`` for the text model that is a part of the multimodal model in ``folder``.

    Args:
        multimodal: the model in ``folder``, on the meta device.

    Raises:
        ModelError: see ``find_sources``; or the model has no such part.
    """
    config_class, model_type = type(model.config), multimodal.config.model_type
    parts = [
        name for name, module in multimodal.named_modules() if type(getattr(module, "config", None)) is config_class
    ]
    if not parts:
        raise ModelError(f"no part of the {model_type} model in {folder} is a {model.config.model_type}")
    sources, base = find_sources(multimodal, folder), f"{model.base_model_prefix}."
    text_sources: dict[str, Source] = {}
    for name in saved_tensors(model):
        candidates = (f"{parts[0]}.{name}", f"{parts[0]}.{name.removeprefix(base)}", name)
        full_name = next((candidate for candidate in candidates if candidate in sources), None)
        if full_name is None:
            raise ModelError(f"the {model_type} model in {folder} has no {name} for its text model")
        text_sources[name] = sources[full_name]
    return text_sources


def saved_sources(model: PreTrainedModel, sources: dict[str, Source]) -> dict[str, Source]:
    """Return the sources of the tensors that transformers would save for ``model``, keyed by their names in files.

    Args:
        model: a model on the meta device.
        sources: the source of each parameter and saved buffer of ``model``, keyed by name.
    """
    tensors = {name: LazyTensor(source) for name, source in sources.items()}
    return {name: tensor.source for name, tensor in revert_weight_conversion(model, tensors).items()}


def _put_on_meta(model: PreTrainedModel) -> None:
    """Replace lazy parameters and buffers by ones on the meta device; tied parameters stay tied."""
    replaced: dict[int, Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, LazyTensor):
                if id(parameter) not in replaced:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    replaced[id(parameter)] = Parameter(empty, parameter.requires_grad)
                module._parameters[name] = replaced[id(parameter)]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, LazyTensor):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")


def _stored_names_of(source: Source | None) -> Iterator[str]:
    return iter(()) if source is None else stored_names(source)


def _check_not_quantized(folder: Path, tensors: list[LazyTensor]) -> None:
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype not in FLOATS})
    if dtypes:
        method = quantization_method(folder) or f"its weights are {' and '.join(dtypes)}"
        raise ModelError(QUANTIZED.format(folder=folder, method=method))


def _check_names_and_shapes(folder: Path, report: LoadStateDictInfo, without_source: list[str]) -> None:
    mismatched = {name: f"{name} {tuple(stored)} for {tuple(shape)}" for name, stored, shape in report.mismatched_keys}
    reported = mismatched.keys() | report.conversion_errors.keys()
    missing = [name for name in without_source if name not in reported]
    problems = {
        "missing": missing + sorted(report.missing_keys - {*missing} - reported),
        "unexpected": sorted(name for name in report.unexpected_keys if not OBSOLETE.search(name)),
        "of another shape": sorted(mismatched.values()),
        "that cannot be converted": sorted(report.conversion_errors),
    }
    listed = [f"{len(names)} {problem}: {summarize_names(names)}" for problem, names in problems.items() if names]
    method = quantization_method(folder) or _method_from_names(report.unexpected_keys)
    if listed and method:
        raise ModelError(QUANTIZED.format(folder=folder, method=method))
    if listed:
        raise ModelError(f"the weights in {folder} do not fit its config.json; {'; '.join(listed)}")


def _method_from_names(unexpected: set[str]) -> str | None:
    return next((name for name in sorted(unexpected) if QUANTIZED_NAMES.search(name)), None)


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
