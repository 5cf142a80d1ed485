"""What dropout and data draw from, kept and put back."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor


@dataclass(frozen=True)
class RandomStates:
    """The states of torch's generators on the host and on this rank's device."""

    host: Tensor
    device: Tensor

    @classmethod
    def capture(cls) -> "RandomStates":
        """The states as they are now."""
        return cls(torch.get_rng_state(), get_accelerator().get_rng_state())

    def restore(self) -> None:
        """Make what follows draw the same numbers again."""
        torch.set_rng_state(self.host)
        get_accelerator().set_rng_state(self.device)


def all_random_states() -> dict[str, Tensor]:
    """The state of every generator of this process, Python's and numpy's too, as tensors that a file can hold."""
    torchs = RandomStates.capture()
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "random.host": torchs.host,
        "random.device": torchs.device,
        "random.python": torch.tensor([version, *internal], dtype=torch.int64),
        "random.python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "random.numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "random.numpy_position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "random.numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }


def restore_all_random_states(states: dict[str, Tensor]) -> None:
    """Put back what ``all_random_states`` has found."""
    RandomStates(states["random.host"], states["random.device"]).restore()
    version, *internal = states["random.python"].tolist()
    gauss = states["random.python_gauss"].tolist()
    random.setstate((version, tuple(internal), gauss[0] if gauss else None))
    position, has_gauss = states["random.numpy_position"].tolist()
    cached = float(states["random.numpy_gauss"])
    np.random.set_state(("MT19937", states["random.numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
