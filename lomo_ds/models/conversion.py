"""From the tensors of a model folder to those of the model, by transformers' own rules, before anything is read.

Renamed keys, prefixes, merged experts and ties are transformers'; here they are applied to tensors that stay in files.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging
from transformers.utils.loading_report import LoadStateDictInfo

from lomo_ds.errors import ModelError
from lomo_ds.models.build import saved_buffers
from lomo_ds.models.files import WeightFiles, some
from lomo_ds.models.lazy_tensor import LazyTensor
from lomo_ds.models.sources import Source


def find_sources(model: PreTrainedModel, files: WeightFiles, folder: str) -> dict[str, Source]:
    """Where the values of each parameter and saved buffer of a meta model come from, by name.

    Parameters are tied afterwards as they are where transformers loads the folder.

    Raises:
        ModelError: tensors are missing, unexpected, of another shape, or cannot be converted.
    """
    tensors = {name: LazyTensor(source) for name, source in files.sources.items()}
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
    without_source = [name for name in parameters if name not in sources or name in report.missing_keys]
    _refuse_mismatch(folder, report, without_source)
    _put_on_meta(model)
    return sources


def saved_sources(model: PreTrainedModel, sources: dict[str, Source]) -> dict[str, Source]:
    """The tensors that transformers would save, by their names in files, made of those that ``model`` consists of.

    Args:
        model: on the meta device.
        sources: of its parameters and saved buffers, by name.
    """
    tensors = {name: LazyTensor(source) for name, source in sources.items()}
    return {name: tensor.source for name, tensor in revert_weight_conversion(model, tensors).items()}


def _put_on_meta(model: PreTrainedModel) -> None:
    """Replace lazy parameters and buffers by ones on the meta device; tied parameters stay one."""
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


def _refuse_mismatch(folder: str, report: LoadStateDictInfo, without_source: list[str]) -> None:
    mismatched = {name: f"{name} {tuple(stored)} for {tuple(shape)}" for name, stored, shape in report.mismatched_keys}
    reported = mismatched.keys() | report.conversion_errors.keys()
    missing = [name for name in without_source if name not in reported]
    missing += sorted(report.missing_keys - {*missing} - reported)
    problems = {
        "missing": missing,
        "unexpected": sorted(report.unexpected_keys),
        "of another shape": sorted(mismatched.values()),
        "that cannot be converted": sorted(report.conversion_errors),
    }
    listed = [f"{len(names)} {problem}: {some(names)}" for problem, names in problems.items() if names]
    if listed:
        raise ModelError(f"the weights in {folder} do not fit its config.json; {'; '.join(listed)}")


@contextlib.contextmanager
def _without_progress_bar() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
