"""Update schedules: decide when the gradients that backward produces are used to update parameters."""

from lomo_ds.update.schedules.choose import Choice, choose_schedule
from lomo_ds.update.schedules.schedule import Schedule

__all__ = ["Choice", "Schedule", "choose_schedule"]
