"""Memory plan of a training job, logged before it starts, and advice if memory runs out."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.distributed.process_group import ranks_on_host
from lomo_ds.errors import DoesNotFitError, LomoError
from lomo_ds.planner import (
    Plan,
    PlannedModel,
    advise,
    check_host_memory,
    detect_machine,
    find_bigger_step,
    plan_run,
    settings_of,
)

logger = logging.getLogger(__name__)

# If a run does not fit although the plan does, the advice assumes this share of the planned memory
ASSUMED_SHARE = 0.9


class MemoryPreflight:
    """Checks a job's plan before training, and explains out-of-memory errors with it.

    Args:
        config: configuration of the model.
        ds_config: complete, without ``auto``.
        arguments: resolved, including the sequence length.
        documents: whether a row holds several documents that must not see each other.
    """

    def __init__(
        self, config: PretrainedConfig, ds_config: dict[str, Any], arguments: TrainArguments, documents: bool
    ) -> None:
        self.config = config
        self.ds_config = ds_config
        self.arguments = arguments
        self.documents = documents
        self.chosen: dict[str, str] = {}  # by the plan in place of ``auto``, on rank 0; empty without a plan

    def log(self) -> None:
        """Log the plan on rank 0; a job trains without one if the planner fails.

        Raises:
            ConfigError: the job would pin more host memory than is available; none is pinned yet.
        """
        if dist.get_rank() != 0:
            return
        try:
            model = self._model()
            plan = self._plan(model)
            advice = None if plan.fits_host else advise(plan, model)
            bigger = None if plan.machine.device == "cpu" else find_bigger_step(plan, model)  # whose speed is unknown
        except Exception as error:
            logger.info("plan: not available (%s)", error)
            return
        check_host_memory(plan, str(advice) if advice else None)
        logger.info("plan: %s", plan)
        self.chosen = {"accumulation": plan.accumulation.name, "gather_granularity": plan.granularity}
        if plan.settings.accumulation_steps > 1:
            logger.info("plan: accumulation %s", plan.accumulation)
        if bigger is not None:
            logger.info("plan: %s", bigger)

    @contextlib.contextmanager
    def explain_out_of_memory(self) -> Iterator[None]:
        """Replace an out-of-memory error of the body by one that advises what would fit.

        Raises:
            DoesNotFitError: the body raised ``torch.OutOfMemoryError``.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". ")[0]
            message = f"rank {dist.get_rank()} has no GPU memory left: {reason}; {self._advice()}"
            raise DoesNotFitError(message) from error

    def _advice(self) -> str:
        try:
            model = self._model()
            plan = self._plan(model)
            expectation = ""
            if plan.fits:
                expectation = f"{plan} were expected, so check whether another process uses memory there; or "
                smaller = dataclasses.replace(plan.machine, gpu_memory=int(ASSUMED_SHARE * plan.gpu_bytes))
                plan = plan_run(model, plan.settings, smaller)
            advice = advise(plan, model)
        except LomoError as error:
            return str(error)
        return f"{expectation}{advice}" if advice else f"{expectation}use more GPUs, or larger ones"

    def _plan(self, model: PlannedModel) -> Plan:
        world_size, local_ranks = dist.get_world_size(), ranks_on_host()
        settings = settings_of(
            self.ds_config,
            gpus=world_size,
            hosts=max(1, world_size // local_ranks),
            sequence=self.arguments.max_seq_length,
            documents=self.documents,
            attention=self.arguments.attn_implementation,
            gradient_checkpointing=self.arguments.gradient_checkpointing,
            tiled_logits=self.arguments.tiled_logits,
            activation_offload=self.arguments.activation_offload,
        )
        return plan_run(model, settings, detect_machine(local_ranks))

    def _model(self) -> PlannedModel:
        return PlannedModel(self.config, self.arguments.model_name_or_path, self.arguments.trust_remote_code)
