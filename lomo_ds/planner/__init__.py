"""The memory planner: predicts without a GPU whether a run fits, how fast it is, and which change makes it fit."""

from lomo_ds.planner.advice import Advice, advise
from lomo_ds.planner.bigger_step import BiggerStep, find_bigger_step
from lomo_ds.planner.plan import Plan, PlannedModel, check_host_memory, plan_run
from lomo_ds.planner.report import format_plan, plan_as_dict
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.suggest import command_line, settings_of, suggested_ds_config
from lomo_ds.simulate.machine import Machine, detect_machine, parse_bytes, parse_rate

__all__ = [
    "Advice",
    "BiggerStep",
    "Machine",
    "Plan",
    "PlannedModel",
    "Settings",
    "advise",
    "check_host_memory",
    "command_line",
    "detect_machine",
    "find_bigger_step",
    "format_plan",
    "parse_bytes",
    "parse_rate",
    "plan_as_dict",
    "plan_run",
    "settings_of",
    "suggested_ds_config",
]
