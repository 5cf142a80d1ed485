"""Simulates a step of the engine on a machine: what runs when on its GPU and its links, with a virtual clock.

``record_step`` runs the real engine on tensors without data and records what it asks of the machine. ``run_program``
says when each operation runs on a given machine; ``find_stalls`` says what waits for what.
"""

from lomo_ds.simulate.machine import Machine
from lomo_ds.simulate.program import Operation, Program, Wait, Work
from lomo_ds.simulate.record_step import SimulatedJob, record_step
from lomo_ds.simulate.stalls import Stall, StallSum, find_stalls, longest_stalls, seconds_by_cause
from lomo_ds.simulate.timeline import Lane, Span, Timeline, run_program

__all__ = [
    "Lane",
    "Machine",
    "Operation",
    "Program",
    "SimulatedJob",
    "Span",
    "Stall",
    "StallSum",
    "Timeline",
    "Wait",
    "Work",
    "find_stalls",
    "longest_stalls",
    "record_step",
    "run_program",
    "seconds_by_cause",
]
