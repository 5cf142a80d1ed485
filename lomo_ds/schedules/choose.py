"""What ``auto`` means: the cheapest schedule that does what was asked in the memory that is there."""

from dataclasses import dataclass

from lomo_ds.config import LomoConfig
from lomo_ds.errors import ConfigError

# The stash is full when backward has consumed the activations, which nobody has seen yet at start.
DEVICE_SHARE = 0.5
# What the ranks of a host may pin together; the rest stays with the operating system and the data loader.
HOST_SHARE = 0.8


@dataclass(frozen=True)
class Choice:
    """A schedule, where its stash lies, and why."""

    schedule: str  # immediate, two_pass or stash
    stash_device: str  # cpu or gpu
    reason: str

    def describe(self) -> str:
        """The choice in a few words, for the log."""
        return f"stash on {self.stash_device}" if self.schedule == "stash" else self.schedule


def choose_schedule(
    lomo: LomoConfig,
    needs_whole_gradient: str | None,
    accumulates: bool,
    stash_bytes: int,
    free_device_bytes: int,
    free_host_bytes: int,
) -> Choice:
    """Resolve ``update_schedule`` and ``stash_device``.

    Args:
        needs_whole_gradient: what was asked for that ``immediate`` cannot do, in words; None if nothing was.
        accumulates: whether a step has several micro-batches.
        stash_bytes: what the stash of one rank takes.
        free_device_bytes: free memory of the device that computes, the smallest over all ranks.
        free_host_bytes: a rank's share of the host's available memory, the smallest over all ranks.

    Raises:
        ConfigError: accumulation needs the stash, and it fits nowhere.
    """
    if lomo.update_schedule == "immediate":
        return Choice("immediate", "gpu", "as asked")
    if lomo.update_schedule == "two_pass":
        return Choice("two_pass", "gpu", "as asked")
    if lomo.update_schedule == "auto" and needs_whole_gradient is None:
        return Choice("immediate", "gpu", "nothing needs the whole gradient")
    why = needs_whole_gradient if lomo.update_schedule == "auto" else "as asked"
    need = f"{_gib(stash_bytes)} of gradient shards a rank"
    if lomo.stash_device != "auto":
        return Choice("stash", lomo.stash_device, f"{why}; {need}")
    if stash_bytes <= DEVICE_SHARE * free_device_bytes:
        return Choice("stash", "gpu", f"{why}; {need}, {_gib(free_device_bytes)} free on the device")
    if stash_bytes <= HOST_SHARE * free_host_bytes:
        return Choice("stash", "cpu", f"{why}; {need}, {_gib(free_host_bytes)} free in host memory")
    nowhere = (
        f"{need} fit neither the device ({_gib(free_device_bytes)} free) nor host memory "
        f"({_gib(free_host_bytes)} free a rank)"
    )
    if lomo.update_schedule == "auto" and not accumulates:
        return Choice("two_pass", "gpu", f"{why}; {nowhere}")
    raise ConfigError(
        f"update_schedule {lomo.update_schedule} needs a stash, but {nowhere}; use more ranks, "
        "update_schedule two_pass with gradient_accumulation_steps 1, or set stash_device yourself"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
