"""Update schedules: when the gradient that backward has just produced is used."""

from lomo_ds.schedules.base import Schedule, Target
from lomo_ds.schedules.choose import Choice, choose_schedule
from lomo_ds.schedules.immediate import Immediate
from lomo_ds.schedules.stash import Stash
from lomo_ds.schedules.two_pass import TwoPass

__all__ = ["Choice", "Immediate", "Schedule", "Stash", "Target", "TwoPass", "choose_schedule"]
