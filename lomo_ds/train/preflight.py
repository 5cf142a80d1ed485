"""What a training job may expect of memory and speed before it starts, and what to do where that was not enough."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import deepspeed.comm as dist
import torch
from transformers import PretrainedConfig

from lomo_ds.config.arguments import TrainArguments
from lomo_ds.distributed.process_group import ranks_on_host
from lomo_ds.errors import DoesNotFitError, LomoError
from lomo_ds.planner import Plan, PlannedModel, advise, check_host_memory, detect_machine, plan_run, settings_of

logger = logging.getLogger(__name__)

LESS = 0.9  # of what a plan had found room for, where there was none


class Outlook:
    """The plan of a training job, made when it is asked for.

    Args:
        config: of the model.
        ds_config: filled.
        length: tokens of a row.
    """

    def __init__(
        self, config: PretrainedConfig, ds_config: dict[str, Any], arguments: TrainArguments, length: int
    ) -> None:
        self.config = config
        self.ds_config = ds_config
        self.arguments = arguments
        self.length = length

    def say(self) -> None:
        """Tell the plan's verdict, on rank 0; a run does not fail for want of a plan.

        Raises:
            ConfigError: it would pin more host memory than there is; none has been pinned yet.
        """
        if dist.get_rank() != 0:
            return
        try:
            model = self._model()
            found = self.plan(model)
            advice = None if found.fits_host else advise(found, model)
        except Exception as error:
            logger.info("plan: none could be made (%s)", error)
            return
        check_host_memory(found, str(advice) if advice else None)
        logger.info("plan: %s", found)

    @contextlib.contextmanager
    def advising(self) -> Iterator[None]:
        """Where memory runs out within, say what would fit.

        Raises:
            DoesNotFitError: in the place of ``torch.OutOfMemoryError``.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            told = str(error).partition(". ")[0]
            raise DoesNotFitError(f"rank {dist.get_rank()} has no GPU memory left: {told}; {self.advice()}") from error

    def advice(self) -> str:
        """What to do about too little memory, in words."""
        try:
            model = self._model()
            found = self.plan(model)
            known = ""
            if found.fits:
                known = f"{found} were expected, so see whether something else takes memory there; or "
                less = dataclasses.replace(found.machine, gpu_memory=int(LESS * found.gpu_bytes))
                found = plan_run(model, found.settings, less)
            advice = advise(found, model)
        except LomoError as error:
            return str(error)
        return f"{known}{advice}" if advice else f"{known}use more GPUs, or larger ones"

    def plan(self, model: PlannedModel) -> Plan:
        """The plan of the job on the machine it runs on."""
        arguments = self.arguments
        world_size = dist.get_world_size()
        local_ranks = ranks_on_host()
        settings = settings_of(
            self.ds_config,
            gpus=world_size,
            hosts=max(1, world_size // local_ranks),
            sequence=self.length,
            gradient_checkpointing=arguments.gradient_checkpointing,
            tiled_logits=arguments.tiled_logits,
            activation_offload=arguments.activation_offload,
        )
        return plan_run(model, settings, detect_machine(local_ranks))

    def _model(self) -> PlannedModel:
        return PlannedModel(self.config, self.arguments.model_name_or_path, self.arguments.trust_remote_code)
