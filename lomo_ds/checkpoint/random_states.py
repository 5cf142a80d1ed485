"""Saving and restoring the states of all random number generators."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lomo_ds.distributed.device import get_device_rng_state, set_device_rng_state


@dataclass(frozen=True)
class RandomStates:
    """The states of torch's generators on the host and on this rank's device."""

    host: Tensor
    device: Tensor

    @classmethod
    def capture(cls) -> "RandomStates":
        """Return the current states."""
        return cls(torch.get_rng_state(), get_device_rng_state())

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self.host)
        set_device_rng_state(self.device)


def all_random_states() -> dict[str, Tensor]:
    """Return the states of this process's generators (torch, Python and NumPy) as tensors for a safetensors file."""
    torch_states = RandomStates.capture()
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "random.host": torch_states.host,
        "random.device": torch_states.device,
        "random.python": torch.tensor([version, *internal], dtype=torch.int64),
        "random.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "random.numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "random.numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "random.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def restore_all_random_states(states: dict[str, Tensor]) -> None:
    """Restore the states that ``all_random_states`` returned."""
    RandomStates(states["random.host"], states["random.device"]).restore()
    version, *internal = states["random.python"].tolist()
    gauss = states["random.python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    position, has_gauss = states["random.numpy_position"].tolist()
    cached = float(states["random.numpy_gauss"])
    np.random.set_state(("MT19937", states["random.numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
