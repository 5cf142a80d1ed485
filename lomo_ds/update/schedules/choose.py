"""What ``auto`` means: the cheapest schedule that does what was asked in the memory that is there."""

from dataclasses import dataclass

from lomo_ds.config.lomo_config import LomoConfig
from lomo_ds.errors import ConfigError
from lomo_ds.memory.budget import HOST_SHARE, format_bytes, require_host_bytes

# The stash is full when backward has consumed the activations, which nobody has seen yet at start.
DEVICE_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """A schedule, where its stash lies, and why."""

    schedule: str  # immediate, two_pass or stash
    stash_device: str  # cpu or gpu
    reason: str

    @property
    def settings(self) -> dict[str, str]:
        """The parameters of LOMO that ask for it by name."""
        return {"update_schedule": self.schedule, "stash_device": self.stash_device}

    def __str__(self) -> str:
        where = f" on {self.stash_device}" if self.schedule == "stash" else ""
        return f"{self.schedule}{where} ({self.reason})"


def choose_schedule(
    lomo: LomoConfig,
    gradient_clipping: float,
    fp16: bool,
    accumulation_steps: int,
    stash_bytes: int,
    free_device_bytes: int,
    free_host_bytes: int,
) -> Choice:
    """Resolve ``update_schedule`` and ``stash_device``.

    Args:
        gradient_clipping: the limit on the global norm; 0 for none.
        fp16: whether an overflow must be found before any update.
        stash_bytes: what the stash of one rank takes.
        free_device_bytes: free memory of the device that computes, the smallest over all ranks.
        free_host_bytes: a rank's share of the host's available memory, the smallest over all ranks.

    Raises:
        ConfigError: accumulation needs the stash, and it fits nowhere; or not where it was asked to be.
    """
    needs_whole_gradient = _need(gradient_clipping, fp16, accumulation_steps)
    if lomo.update_schedule in ("immediate", "two_pass"):
        return Choice(lomo.update_schedule, "gpu", "as asked")
    if lomo.update_schedule == "auto" and needs_whole_gradient is None:
        return Choice("immediate", "gpu", "nothing needs the whole gradient")
    why = needs_whole_gradient if lomo.update_schedule == "auto" else "as asked"
    need = f"{format_bytes(stash_bytes)} of gradient shards a rank"
    if lomo.stash_device == "cpu":
        require_host_bytes(
            stash_bytes, free_host_bytes, "stash_device cpu", "use update_schedule two_pass, or stash_device gpu"
        )
    if lomo.stash_device != "auto":
        return Choice("stash", lomo.stash_device, f"{why}; {need}")
    if stash_bytes <= DEVICE_SHARE * free_device_bytes:
        return Choice("stash", "gpu", f"{why}; {need}, {format_bytes(free_device_bytes)} free on the device")
    if stash_bytes <= HOST_SHARE * free_host_bytes:
        return Choice("stash", "cpu", f"{why}; {need}, {format_bytes(free_host_bytes)} free in host memory")
    nowhere = (
        f"{need} fit neither the device ({format_bytes(free_device_bytes)} free) nor host memory "
        f"({format_bytes(free_host_bytes)} free a rank)"
    )
    if lomo.update_schedule == "auto" and accumulation_steps == 1:
        return Choice("two_pass", "gpu", f"{why}; {nowhere}")
    raise ConfigError(
        f"update_schedule {lomo.update_schedule} needs a stash, but {nowhere}; use more ranks, "
        "update_schedule two_pass with gradient_accumulation_steps 1, or set stash_device yourself"
    )


def _need(gradient_clipping: float, fp16: bool, accumulation_steps: int) -> str | None:
    """What ``immediate`` cannot do, in words; None if nothing of it was asked for."""
    if gradient_clipping > 0:
        return f"gradient_clipping {gradient_clipping} needs the global norm before any update"
    if fp16:
        return "fp16 needs to know of overflow before any update"
    if accumulation_steps > 1:
        return f"gradient_accumulation_steps {accumulation_steps} needs gradients added up"
    return None
