"""Update schedules: when the gradient that backward has just produced is used."""

from lomo_ds.update.schedules.choose import Choice, choose_schedule
from lomo_ds.update.schedules.schedule import Schedule, Target

__all__ = ["Choice", "Schedule", "Target", "choose_schedule"]
