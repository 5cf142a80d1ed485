"""DeepSpeed internals that lomo_ds relies on; if a release changes one, a test fails with its name."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

import lomo_ds
from lomo_ds.zero3.parameter_access import ParameterAccess

# Private attributes that classes of lomo_ds set themselves, and one each of Python and of transformers
OWN = {
    "_counts_as_overflow", "_has_loss", "_in_train_batch", "_is_decided", "_loss_sum", "_packed_rows",
    "_parameter_access",
}  # fmt: skip
OF_PYTHON = {"_exit"}
OF_TRANSFORMERS = {"_attn_implementation"}


def methods_of(owner: type) -> dict[str, ast.FunctionDef]:
    """Return the methods of a class from its source, because decorators hide the signatures."""
    body = ast.parse(inspect.getsource(owner)).body[0]
    return {node.name: node for node in ast.walk(body) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (DeepSpeedEngine, "_configure_optimizer", ["self", "client_optimizer", "model_parameters"]),
        (DeepSpeedEngine, "_is_supported_optimizer", ["self", "optimizer_name"]),
        (DeepSpeedEngine, "_backward_prologue", ["self"]),
        (DeepSpeedEngine, "_broadcast_model", ["self"]),
        (DeepSpeedEngine, "backward", ["self", "loss", "retain_graph", "scale_wrt_gas"]),
        (DeepSpeedEngine, "step", ["self", "lr_kwargs"]),
        (DeepSpeedEngine, "set_gradient_accumulation_boundary", ["self", "is_boundary"]),
        (DeepSpeedEngine, "_scheduler_from_config", ["self", "optimizer"]),
        (DeepSpeedEngine, "_configure_lr_scheduler", ["self"]),
        (DeepSpeedEngine, "dynamic_loss_scale_args", ["self"]),
        (DeepSpeedEngine, "zero_gather_16bit_weights_on_model_save", ["self"]),
        (DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict", ["self", "exclude_frozen_parameters"]),
        (ZeROOptimizer, "scale_if_loss", ["self", "value"]),
        (ZeROOptimizer, "needs_scaler", ["self"]),
        (DeepSpeedZeRoOffload, "partition_all_parameters", ["self"]),
        (DeepSpeedZeRoOffload, "release_backward_leftovers", ["self"]),
        (PartitionedParameterCoordinator, "is_record_trace", ["self"]),
        (PartitionedParameterCoordinator, "_invalidate_trace", ["self"]),
        (DeepSpeedZeRoOffload, "destroy", ["self"]),
        (Init, "_convert_to_zero_parameters", ["self", "param_list"]),
    ],
)
def test_method(owner: type, name: str, parameters: list[str]) -> None:
    method = methods_of(owner).get(name)
    assert method, f"DeepSpeed no longer has {owner.__name__}.{name}, which lomo_ds calls or overrides"
    got = [argument.arg for argument in method.args.args]
    assert got == parameters, f"DeepSpeed's {owner.__name__}.{name} now takes {got}; lomo_ds expects {parameters}"


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (DeepSpeedZeRoOffload.__init__, {"module", "timers", "ds_config", "dp_process_group", "offload_param_config"}),
        (Init.__init__, {"module", "config_dict_or_path", "dtype"}),
        (CreateLossScaler, {"dtype", "static_loss_scale", "dynamic_scaling", "dynamic_loss_args"}),
    ],
)
def test_arguments(call: Any, expected: set[str]) -> None:
    missing = expected - set(inspect.signature(call).parameters)
    assert not missing, f"DeepSpeed's {call.__qualname__} no longer takes {missing}"


# Every attribute of DeepSpeed's own that lomo_ds reads, sets or replaces, by the module that defines it
ATTRIBUTES = {
    "deepspeed.runtime.engine": [
        "_config", "_global_grad_norm", "_is_gradient_accumulation_boundary", "_step_applied", "basic_optimizer",
        "client_lr_scheduler", "global_samples", "global_steps", "lr_scheduler", "micro_steps",
        "seq_data_parallel_group", "skipped_steps",
    ],
    "deepspeed.runtime.base_optimizer": [
        "custom_loss_scaler", "dynamic_loss_scale", "external_loss_scale", "loss_scaler", "torch_autocast_gradscaler",
    ],
    "deepspeed.runtime.fp16.loss_scaler": ["cur_hysteresis", "cur_iter", "cur_scale", "last_overflow_iter"],
    "deepspeed.runtime.lr_schedules": ["_last_lr", "last_batch_iteration"],
    "deepspeed.runtime.zero.partition_parameters": [
        "_convert_to_deepspeed_param", "all_gather", "all_gather_coalesced", "ds_id", "ds_numel", "ds_process_group",
        "ds_shape", "ds_status", "ds_tensor", "final_location", "nvme_swapper", "partition",
    ],
    "deepspeed.runtime.zero.parameter_offload": [
        "ds_inflight_param_registry", "get_param_coordinator", "persistent_parameters",
    ],
    "deepspeed.runtime.zero.partitioned_param_coordinator": ["_invalidate_trace", "__max_ongoing_fetch_events"],
    "deepspeed.runtime.swap_tensor.partitioned_param_swapper": ["remove_partition_and_release_buffers", "swap_in"],
    "deepspeed.utils.tensor_fragment": ["_z3_optimizer"],
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in ATTRIBUTES.items() for name in names])
def test_attribute(module: str, name: str) -> None:
    source = inspect.getsource(importlib.import_module(module))
    assert re.search(rf"\b{name}\b", source), f"{module} no longer has {name}, which lomo_ds uses"


def test_every_attribute_of_deepspeeds_own_is_named_here() -> None:
    """Attributes of its parameters begin with ``ds_``; private ones are those that no class of lomo_ds defines."""
    package = Path(lomo_ds.__file__).parent
    nodes = [
        node
        for folder in ("zero3", "engine", "distributed")
        for path in (package / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) and node.attr not in defined}
    private = {name for name in used if name.startswith("ds_") or re.match("_[a-z]", name)}
    of_deepspeed = private - OWN - OF_PYTHON - OF_TRANSFORMERS
    assert of_deepspeed <= {name for names in ATTRIBUTES.values() for name in names}


def test_the_epilogue_is_called_by_name() -> None:
    source = ast.unparse(methods_of(DeepSpeedEngine)["allreduce_gradients"])
    assert "self.optimizer.overlapping_partition_gradients_reduce_epilogue()" in source, (
        "DeepSpeed no longer ends a backward pass through overlapping_partition_gradients_reduce_epilogue"
    )


def test_the_inference_op_is_excluded_by_its_name() -> None:
    source = inspect.getsource(importlib.import_module("deepspeed.comm.torch").build_shm_op)
    assert 'create_op_builder("ShareMemCommBuilder")' in source, "DeepSpeed has renamed its shared-memory op"
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in source, "DeepSpeed compiles it regardless"


def test_the_limit_of_fetch_events_is_raised_by_its_name() -> None:
    source = inspect.getsource(PartitionedParameterCoordinator)
    assert "len(self.__ongoing_fetch_events) > self.__max_ongoing_fetch_events" in source, (
        "DeepSpeed's coordinator no longer limits its fetch events by __max_ongoing_fetch_events, so "
        "gathering.MAX_FETCH_EVENTS lifts no limit"
    )


def test_safe_get_and_set_call_parameter_methods_by_name() -> None:
    module = importlib.import_module("deepspeed.utils.tensor_fragment")
    called = set(re.findall(r"\._z3_optimizer\.(\w+)\(", inspect.getsource(module)))
    methods = {name for name in vars(ParameterAccess) if not name.startswith("_")} - {"remove"}
    assert called == methods, "DeepSpeed's safe_get_* and safe_set_* call other methods than ParameterAccess has"


def test_initialize_has_deepspeeds_arguments() -> None:
    expected = inspect.signature(deepspeed.initialize).parameters
    assert list(inspect.signature(lomo_ds.initialize).parameters) == list(expected)
