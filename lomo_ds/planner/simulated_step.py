"""The timeline of a plan: a recorded step of the job that it plans, on its machine."""

from typing import Any

from lomo_ds.config.lomo_config import lomo_parameters
from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan, PlannedModel
from lomo_ds.planner.suggest import suggested_ds_config
from lomo_ds.simulate import Program, SimulatedJob, Timeline, record_step, run_program
from lomo_ds.simulate.own_process import Report


def simulate_plan(plan: Plan, model: PlannedModel, report: Report = lambda stage: None) -> Timeline:
    """Return the timeline of a step of ``plan``, which takes some seconds to record.

    Args:
        report: see ``record_step``.

    Raises:
        ConfigError: the plan is for one of DeepSpeed's own optimizers, or the engine refuses it.
        ModelError: the step cannot be simulated.
    """
    return run_program(record_plan(plan, model, report), plan.machine)


def record_plan(plan: Plan, model: PlannedModel, report: Report = lambda stage: None) -> Program:
    """Record a step of ``plan``; see ``simulate_plan``."""
    settings = plan.settings
    if settings.is_baseline:
        raise ConfigError(f"a timeline shows the optimizers of lomo_ds, not {settings.optimizer}; leave --optim out")
    return record_step(
        SimulatedJob(
            model=model.config,
            ds_config=_resolved_ds_config(plan),
            world_size=settings.gpus,
            ranks_on_host=settings.gpus_per_host,
            gpu_memory=plan.machine.gpu_memory,
            precision=settings.precision,
            sequence=settings.sequence,
            documents=settings.documents,
            gradient_checkpointing=settings.gradient_checkpointing,
            activation_offload=settings.activation_offload,
            tiled_logits=plan.tiled,
            trust_remote_code=model.trust_remote_code,
        ),
        report,
    )


def _resolved_ds_config(plan: Plan) -> dict[str, Any]:
    """Return the DeepSpeed config of a plan, with what the engine would decide from its free memory."""
    settings = plan.settings
    config = suggested_ds_config(plan, nvme_path=".")
    config["train_micro_batch_size_per_gpu"] = settings.batch
    config["gradient_accumulation_steps"] = settings.accumulation_steps
    config["gradient_clipping"] = settings.gradient_clipping
    params = {name: getattr(settings, name) for name in lomo_parameters(type(settings))}
    params |= plan.choice.settings
    params |= {"gather_granularity": plan.granularity, "accumulation": plan.accumulation.name}
    # the noise of stochastic rounding takes no time, since the kernels draw it themselves
    params |= {"lr": 1.0, "rounding": "nearest"}
    config["optimizer"]["params"] = {name: value for name, value in params.items() if value is not None}
    return config
