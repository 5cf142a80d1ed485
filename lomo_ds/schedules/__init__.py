"""Update schedules: when the gradient that backward has just produced is used."""

from lomo_ds.schedules.base import Schedule, Target
from lomo_ds.schedules.build import build_schedule
from lomo_ds.schedules.choose import Choice, choose_schedule

__all__ = ["Choice", "Schedule", "Target", "build_schedule", "choose_schedule"]
