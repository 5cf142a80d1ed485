"""Simulates rank 0 of a larger group: one process with the memory of one rank among many.

torch's fake process group communicates nothing. The parts of the other ranks are filled in with this rank's own part,
so that gathered parameters have ordinary values, the loss is finite and steps update the weights. Memory is that of a
real rank; times mean nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d


def start_simulated_process_group(world_size: int) -> None:
    """Make this process rank 0 of ``world_size`` ranks; the environment of a rank must be set."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from lomo_ds.distributed.process_group import start_process_group

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    _patch_collectives()  # before deepspeed looks the functions up
    start_process_group()


def _patch_collectives() -> None:
    """Fill in the parts of the other ranks, which the fake process group of some torch versions leaves out."""
    gather, scatter = distributed_c10d.all_gather_into_tensor, distributed_c10d.reduce_scatter_tensor

    @torch.no_grad()
    def all_gather_into_tensor(output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = gather(output_tensor, input_tensor, *args, **kwargs)
        for part in output_tensor.view(-1).split(input_tensor.numel()):
            if part.data_ptr() != input_tensor.data_ptr():  # DeepSpeed gathers in place
                part.copy_(input_tensor.view(-1))
        return work

    @torch.no_grad()
    def reduce_scatter_tensor(output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        work = scatter(output, input, *args, **kwargs)
        output.view(-1).copy_(input.view(-1)[: output.numel()])
        return work

    for module in (torch.distributed, distributed_c10d):
        vars(module).update(all_gather_into_tensor=all_gather_into_tensor, reduce_scatter_tensor=reduce_scatter_tensor)
