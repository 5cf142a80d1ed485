"""Resolves ``update_schedule`` auto: the cheapest schedule that supports the settings and fits into memory."""

from dataclasses import dataclass

from lomo_ds.config.lomo_config import LomoParameters
from lomo_ds.errors import ConfigError
from lomo_ds.memory.budget import HOST_SHARE, check_host_memory, format_bytes

# Share of the free device memory that a stash may use. The rest is for activations, whose size is unknown at start.
DEVICE_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """A resolved schedule, the device of its stash, and the reason for the choice."""

    schedule: str  # immediate, two_pass or stash
    stash_device: str  # cpu or gpu
    reason: str

    @property
    def settings(self) -> dict[str, str]:
        """Parameters of LOMO that request this choice explicitly."""
        return {"update_schedule": self.schedule, "stash_device": self.stash_device}

    def __str__(self) -> str:
        location = f" on {self.stash_device}" if self.schedule == "stash" else ""
        return f"{self.schedule}{location} ({self.reason})"


def choose_schedule(
    lomo: LomoParameters,
    gradient_clipping: float,
    fp16: bool,
    accumulation_steps: int,
    stash_bytes: int,
    free_device_bytes: int,
    free_host_bytes: int,
) -> Choice:
    """Resolve ``update_schedule`` and ``stash_device``.

    Args:
        gradient_clipping: the limit of the global norm; 0 does not clip.
        fp16: whether training is in fp16, which must detect overflow before any update.
        accumulation_steps: gradients of a parameter that the schedule gets in a step; 1 with layered accumulation.
        stash_bytes: bytes of one rank's stash.
        free_device_bytes: free memory of the compute device, the minimum over all ranks.
        free_host_bytes: a rank's share of the available host memory, the minimum over all ranks.

    Raises:
        ConfigError: the stash is required but does not fit, or does not fit on the requested device; or the requested
            schedule cannot accumulate gradients.
    """
    against_immediate = _reason_against_immediate(gradient_clipping, fp16, accumulation_steps)
    if lomo.update_schedule in ("immediate", "two_pass"):
        if accumulation_steps > 1:
            raise ConfigError(
                f"update_schedule {lomo.update_schedule} keeps no gradients, which several micro-batches need without "
                "layered accumulation; use update_schedule stash"
            )
        return Choice(lomo.update_schedule, "gpu", "as configured")
    if lomo.update_schedule == "auto" and against_immediate is None:
        return Choice("immediate", "gpu", "no setting needs all gradients before an update")
    reason = against_immediate if lomo.update_schedule == "auto" else "as configured"
    stash_size = f"{format_bytes(stash_bytes)} of gradient shards per rank"
    if lomo.stash_device == "cpu":
        check_host_memory(
            stash_bytes, free_host_bytes, "stash_device cpu", "use update_schedule two_pass, or stash_device gpu"
        )
    if lomo.stash_device != "auto":
        return Choice("stash", lomo.stash_device, f"{reason}; {stash_size}")
    if stash_bytes <= DEVICE_SHARE * free_device_bytes:
        return Choice("stash", "gpu", f"{reason}; {stash_size}, {format_bytes(free_device_bytes)} free on the device")
    if stash_bytes <= HOST_SHARE * free_host_bytes:
        return Choice("stash", "cpu", f"{reason}; {stash_size}, {format_bytes(free_host_bytes)} free in host memory")
    does_not_fit = (
        f"{stash_size} fit neither the device ({format_bytes(free_device_bytes)} free) nor host memory "
        f"({format_bytes(free_host_bytes)} free per rank)"
    )
    if lomo.update_schedule == "auto" and accumulation_steps == 1:
        return Choice("two_pass", "gpu", f"{reason}; {does_not_fit}")
    raise ConfigError(
        f"update_schedule {lomo.update_schedule} needs a stash, but {does_not_fit}; use more ranks, "
        "update_schedule two_pass with gradient_accumulation_steps 1, or set stash_device yourself"
    )


def _reason_against_immediate(gradient_clipping: float, fp16: bool, accumulation_steps: int) -> str | None:
    """Return why ``immediate`` does not support the settings; None if it does."""
    if gradient_clipping > 0:
        return f"gradient_clipping {gradient_clipping} needs the global norm before any update"
    if fp16:
        return "fp16 needs to detect overflow before any update"
    if accumulation_steps > 1:
        return f"gradient_accumulation_steps {accumulation_steps} needs gradients to accumulate"
    return None
