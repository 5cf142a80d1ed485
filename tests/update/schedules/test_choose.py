"""Schedule choice: what ``auto`` picks, and which settings are refused."""

from typing import Any

import pytest

from lomo_ds.config.lomo_config import LomoConfig
from lomo_ds.errors import ConfigError
from lomo_ds.update.schedules import Choice, choose_schedule

GIB = 2**30


def choose(
    schedule: str = "auto",
    stash_device: str = "auto",
    clipping: float = 1.0,
    fp16: bool = False,
    accumulation: int = 1,
    stash: int = 2 * GIB,
    device: int = 100 * GIB,
    host: int = 100 * GIB,
) -> Choice:
    lomo = LomoConfig(
        lr=0.1,
        update_schedule=schedule,  # type: ignore[arg-type]
        stash_device=stash_device,  # type: ignore[arg-type]
    )
    return choose_schedule(lomo, clipping, fp16, accumulation, stash, device, host)


def test_immediate_when_no_setting_needs_all_gradients() -> None:
    assert choose(clipping=0.0).schedule == "immediate"


@pytest.mark.parametrize(
    ("settings", "reason"), [({"fp16": True}, "fp16 needs"), ({"accumulation": 4}, "_steps 4 needs")]
)
def test_stash_when_a_setting_needs_all_gradients(settings: dict[str, Any], reason: str) -> None:
    choice = choose(clipping=0.0, **settings)
    assert choice.schedule == "stash"
    assert reason in str(choice)


def test_stash_on_the_device_if_it_fits() -> None:
    choice = choose()
    assert (choice.schedule, choice.stash_device) == ("stash", "gpu")
    assert "gradient_clipping 1.0" in choice.reason
    assert "2.0 GiB" in choice.reason


def test_stash_in_host_memory_if_only_that_fits() -> None:
    assert (choose(device=3 * GIB).schedule, choose(device=3 * GIB).stash_device) == ("stash", "cpu")


def test_two_pass_if_the_stash_does_not_fit() -> None:
    assert choose(device=3 * GIB, host=2 * GIB).schedule == "two_pass"


def test_accumulation_is_refused_if_the_stash_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"fit neither the device .* nor host memory"):
        choose(device=3 * GIB, host=2 * GIB, accumulation=2)


@pytest.mark.parametrize("schedule", ["immediate", "two_pass"])
def test_a_configured_schedule_is_used(schedule: str) -> None:
    assert choose(schedule, clipping=0.0) == Choice(schedule, "gpu", "as configured")


def test_a_stash_in_host_memory_that_does_not_fit_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"stash_device cpu needs 9.0 GiB .* of 10.0 GiB .* 8.0 GiB may be pinned; use"
    ):
        choose("stash", "cpu", stash=9 * GIB, host=10 * GIB)


def test_a_configured_stash_device_is_used() -> None:
    assert choose("stash", "cpu").stash_device == "cpu"
