"""What dropout draws from, kept and put back."""

from dataclasses import dataclass

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
