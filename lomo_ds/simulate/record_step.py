"""Runs steps of the real engine on a simulated GPU, and records one.

Nothing is computed: tensors have shapes and no data, so a model of any size takes seconds and little memory. Streams,
events, copies and collectives are recorded as the engine and DeepSpeed ask for them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import import_utils

from lomo_ds import zero3
from lomo_ds.config.ds_fields import complete_ds_config
from lomo_ds.engine.initialize import initialize
from lomo_ds.models import meta_model, recompute_activations, tile_logits
from lomo_ds.numerics.precision import DTYPES, Precision
from lomo_ds.simulate.costs import touched_bytes
from lomo_ds.simulate.fused_attention import fused_attention
from lomo_ds.simulate.kernel_stand_ins import install_kernels
from lomo_ds.simulate.own_process import Report, call_in_own_process
from lomo_ds.simulate.program import Program, Work
from lomo_ds.simulate.recorder import Recorder
from lomo_ds.simulate.simulated_drive import install_drive
from lomo_ds.simulate.simulated_gpu import DEVICE, install_device
from lomo_ds.simulate.simulated_group import start_simulated_group
from lomo_ds.simulate.small_values import TensorsFromHost
from lomo_ds.simulate.streams import Streams

AMPLE_BYTES = 2**50  # host memory of a simulated rank, which is never used
WARMUP_STEPS = 2  # in which DeepSpeed learns the order of modules


@dataclass(frozen=True)
class SimulatedJob:
    """A job whose rank 0 is simulated.

    Attributes:
        model: configuration of the model.
        ds_config: DeepSpeed config without ``auto``, with everything that depends on free memory decided.
        world_size: number of ranks; ``ranks_on_host``, of those on a host.
        gpu_memory: bytes of a GPU.
        precision: precision of the weights.
        sequence: tokens of a row.
        documents: whether each row holds two documents that do not see each other.
        gradient_checkpointing, activation_offload, tiled_logits: as the arguments of ``launch/train.py``.
    """

    model: PretrainedConfig
    ds_config: dict[str, Any]
    world_size: int
    ranks_on_host: int
    gpu_memory: int
    precision: Precision
    sequence: int
    gradient_checkpointing: bool
    activation_offload: bool
    tiled_logits: bool
    documents: bool = False
    trust_remote_code: bool = False


def record_step(job: SimulatedJob, report: Report = lambda stage: None) -> Program:
    """Record a step of ``job``, in a process of its own, since the simulation replaces parts of torch.

    Args:
        report: is told several times a second, in words, what is being done.

    Raises:
        LomoError: the engine refuses the job.
        ModelError: the step cannot be simulated.
    """
    program: Program = call_in_own_process(_record, job, report)
    return program


def _record(job: SimulatedJob, report: Report) -> Program:
    logging.disable(logging.WARNING)
    report("build the model")
    streams = install_device(job.gpu_memory)
    start_simulated_group(streams, job.world_size, job.ranks_on_host)
    install_kernels(streams)
    install_drive(streams, job.ranks_on_host)
    torch.nn.functional.scaled_dot_product_attention = _attention(streams)
    # transformers keeps masks that it need not keep where it takes a tensor for one of a compiler
    import_utils.is_fake_tensor = lambda tensor: False
    model = meta_model(job.model, DTYPES[job.precision], job.trust_remote_code)
    with _recording(streams):
        return _run_steps(job, model, streams, report)


@contextmanager
def _recording(streams: Streams) -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder(streams), TensorsFromHost(DEVICE):
        yield


def _attention(streams: Streams) -> Any:
    def add(name: str, flops: int, tensors: list[Tensor]) -> None:
        streams.current.add(name, Work(flops=flops, memory=sum(map(touched_bytes, tensors))))

    return fused_attention(add)


def _run_steps(job: SimulatedJob, model: PreTrainedModel, streams: Streams, report: Report) -> Program:
    _move_to_device(model)
    ds_config = complete_ds_config(job.ds_config, job.world_size)
    zero3.split(model, ds_config, DTYPES[job.precision], AMPLE_BYTES)
    model.train()
    if job.tiled_logits:
        tile_logits(model)
    if job.gradient_checkpointing:
        recompute_activations(model, job.activation_offload)
    engine = initialize(model=model, config=ds_config)[0]
    rows, steps = ds_config["train_micro_batch_size_per_gpu"], ds_config["gradient_accumulation_steps"]
    ids = torch.zeros(rows, job.sequence, dtype=torch.int64, device=DEVICE)
    inputs = {"input_ids": ids, "labels": ids}
    if job.documents:
        inputs["position_ids"] = (torch.arange(job.sequence) % (job.sequence // 2)).expand(rows, -1).to(DEVICE)
    micro_batches = [inputs] * steps
    for step in range(WARMUP_STEPS):
        report(f"warm up, step {step + 1} of {WARMUP_STEPS}")
        engine.train_batch(micro_batches[:1])
    report("record a step")
    streams.begin_program()
    engine.train_batch(micro_batches)
    return streams.program


def _move_to_device(model: PreTrainedModel) -> None:
    """Replace parameters and buffers by tensors of the simulated GPU; tied parameters stay tied."""
    moved: dict[Parameter, Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                    moved[parameter] = Parameter(values, parameter.requires_grad)
                module._parameters[name] = moved[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(DEVICE)
