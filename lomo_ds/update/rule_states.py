"""State of the update rules: allocated from the rules' specs, on the device that computes."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lomo_ds.numerics import int8
from lomo_ds.numerics.flat import ceil_div
from lomo_ds.numerics.int8 import Values
from lomo_ds.update.rules import Rule, State, StateSpec
from lomo_ds.update.target import Target
from lomo_ds.zero3 import SCALES, Shard

FIRST_NUMBER = 2**19  # of eight-bit state; lower numbers are those of eight-bit weights


class RuleStates:
    """Allocates and holds the state of all parameters.

    Args:
        targets: all trained parameters.
        rules: the rule of each target, by name.
        world_size: number of ranks that parameters are partitioned over.
        device: the compute device.

    Attributes:
        specs: the specs of each target's state, by the target's name and the spec's.
        storage: the allocated tensors by the same names: 1-D if sharded, a buffer of codes and scales if in eight bits.
    """

    def __init__(self, targets: list[Target], rules: dict[str, Rule], world_size: int, device: torch.device) -> None:
        self.targets = {target.name: target for target in targets}
        self.specs = {target.name: rules[target.name].state(target) for target in targets}
        self.storage: dict[str, dict[str, Tensor]] = {name: {} for name in self.specs}
        self.values: dict[str, State] = {}
        number = FIRST_NUMBER
        for target in targets:
            values: dict[str, Values] = {}
            for key, spec in self.specs[target.name].items():
                _validate(target, spec)
                storage = _allocate(target, spec, world_size, device)
                self.storage[target.name][key] = storage
                if spec.dtype == torch.int8:
                    padded = int8.view_blocks(storage, ceil_div(target.full_numel, world_size), number)
                    padded.scales.fill_(int8.SMALLEST_SCALE)  # a block of zeros is divided by its scale
                    values[key] = int8.Blocks(
                        padded.codes[: target.numel], padded.scales[: int8.block_count(target.numel)], number
                    )
                else:
                    values[key] = storage
                number += 1
            self.values[target.name] = values

    def shards(self, group: ProcessGroup) -> list[Shard]:
        """Return this rank's slices of all sharded state, as shards named ``<parameter>:<state>``.

        Args:
            group: the ranks that parameters are partitioned over.
        """
        shards = []
        rank, world_size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        for target, key, spec in self._entries():
            if not spec.sharded:
                continue
            name, storage = _state_name(target, key), self.storage[target.name][key]
            values = self.values[target.name][key]
            if isinstance(values, Tensor):
                shards.append(Shard(name, values, target.start, spec.shape, group, storage))
                continue
            scales = int8.view_blocks(storage, ceil_div(target.full_numel, world_size)).scales
            all_scales = torch.Size([world_size * scales.numel()])
            shards.append(Shard(name, values.codes, target.start, spec.shape, group, storage))
            shards.append(Shard(name + SCALES, scales, rank * scales.numel(), all_scales, group, scales))
        return shards

    def replicated(self) -> dict[str, Tensor]:
        """Return all state that is equal on every rank, by names as in ``shards``."""
        return {
            _state_name(target, key): self.storage[target.name][key]
            for target, key, spec in self._entries()
            if not spec.sharded
        }

    def _entries(self) -> Iterator[tuple[Target, str, StateSpec]]:
        for name, specs in self.specs.items():
            for key, spec in specs.items():
                yield self.targets[name], key, spec


def _state_name(target: Target, key: str) -> str:
    return f"{target.name}:{key}"


def state_bytes(target: Target, specs: dict[str, StateSpec], world_size: int) -> int:
    """Return the bytes that ``RuleStates`` allocates for a target on this rank."""
    return sum(_allocate(target, spec, world_size, torch.device("meta")).nbytes for spec in specs.values())


def _allocate(target: Target, spec: StateSpec, world_size: int, device: torch.device) -> Tensor:
    if not spec.sharded:
        return torch.zeros(spec.shape, dtype=spec.dtype, device=device)
    if spec.dtype == torch.int8:  # every rank has equally many scales
        return torch.zeros(
            int8.quantized_bytes(ceil_div(target.full_numel, world_size)), dtype=torch.int8, device=device
        )
    return torch.zeros(target.numel, dtype=spec.dtype, device=device)


def _validate(target: Target, spec: StateSpec) -> None:
    assert not spec.sharded or spec.shape.numel() == target.full_numel, "a sharded state is sliced like its parameter"
    assert spec.sharded or spec.dtype != torch.int8, "only sharded state is kept in eight bits"
