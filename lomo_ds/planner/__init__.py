"""Bytes and seconds on paper: will a run fit, what bounds its step, and the smallest change that makes it fit."""

from lomo_ds.planner.advice import Advice, advise
from lomo_ds.planner.machine import Machine, parse_bytes, parse_rate, this_machine
from lomo_ds.planner.plan import Plan, PlannedModel, plan, refuse_what_does_not_fit_host
from lomo_ds.planner.report import as_json, as_text
from lomo_ds.planner.settings import Settings
from lomo_ds.planner.suggest import command_line, settings_of, suggested_ds_config

__all__ = [
    "Advice",
    "Machine",
    "Plan",
    "PlannedModel",
    "Settings",
    "advise",
    "as_json",
    "as_text",
    "command_line",
    "parse_bytes",
    "parse_rate",
    "plan",
    "refuse_what_does_not_fit_host",
    "settings_of",
    "suggested_ds_config",
    "this_machine",
]
