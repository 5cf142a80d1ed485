"""Searches the smallest change that makes a plan fit: single changes before combined ones, cheap before costly."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations, islice

from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan, PlannedModel, plan_run
from lomo_ds.planner.settings import Settings

MAX_GPUS, GPUS_PER_HOST = 64, 8


@dataclass(frozen=True)
class Advice:
    """Changes that make a plan fit, and the plan with them.

    Attributes:
        changes: the changes in words.
        plan: the plan that fits.
    """

    changes: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        """Describe the changes and the plan in one clause."""
        *first, last = self.changes
        changes = f"{', '.join(first)} and {last}" if first else last
        return f"it fits with {changes}: {self.plan}"


@dataclass(frozen=True)
class _Variant:
    words: str
    settings: Settings


Change = Callable[[Settings], Iterator[_Variant]]
Attempt = Callable[[Settings], Plan | None]  # None: the settings are invalid


def advise(plan: Plan, model: PlannedModel) -> Advice | None:
    """Return the smallest change that makes ``plan`` fit; None if it fits already, or if no known change suffices."""
    if plan.fits:
        return None

    @cache  # different changes may lead to the same settings
    def attempt(settings: Settings) -> Plan | None:
        try:
            return plan_run(model, settings, plan.machine)
        except ConfigError:
            return None

    cheap, costly = _cheap_changes(plan, model), _costly_changes(plan)
    pairs = sorted(combinations(range(len(cheap)), 2), key=sum)
    for change in (*cheap, *costly):
        fitting = _mildest(plan, attempt, [_first_variant(change)])
        if fitting is not None:
            return fitting
    for one, other in pairs:
        fitting = _mildest(plan, attempt, [cheap[one], cheap[other]])
        if fitting is not None:
            return fitting
    return _combine(plan, attempt, [*cheap, *costly])


def _combine(plan: Plan, attempt: Attempt, changes: list[Change]) -> Advice | None:
    """Add changes that help until the plan fits, then drop those that turn out unnecessary, the costliest first."""
    chosen: list[Change] = []
    shortfall = _shortfall(plan)
    for change in changes:
        fitting = _mildest(plan, attempt, [*chosen, change])
        if fitting is None:
            tried = attempt(_apply(plan.settings, [*chosen, change])[1])
            if tried is not None and _shortfall(tried) < shortfall:
                chosen, shortfall = [*chosen, change], _shortfall(tried)
            continue
        needed = [*chosen, change]
        for candidate in reversed(chosen):
            fewer = [change for change in needed if change is not candidate]
            without = _mildest(plan, attempt, fewer)
            if without is not None:
                needed, fitting = fewer, without
        return fitting
    return None


def _shortfall(plan: Plan) -> int:
    """Return the bytes by which the plan exceeds GPU memory and host memory."""
    on_gpu = plan.gpu_bytes - plan.machine.gpu_memory
    return max(0, on_gpu) + max(0, plan.host_bytes - plan.usable_host_bytes)


def _first_variant(change: Change) -> Change:
    """Restrict a change to its mildest variant, for example half the batch size."""
    return lambda settings: islice(change(settings), 1)


def _mildest(plan: Plan, attempt: Attempt, changes: list[Change]) -> Advice | None:
    """Apply all of ``changes`` in full, except the last one, of which the mildest variant that fits is used."""
    *rest, last = changes
    words, settings = _apply(plan.settings, rest)
    for variant in _variants(last, settings):
        tried = attempt(variant.settings)
        if tried is not None and tried.fits:
            return Advice((*words, variant.words), tried)
    return None


def _apply(settings: Settings, changes: list[Change]) -> tuple[list[str], Settings]:
    """Apply changes in full; return them in words, and the resulting settings."""
    words = []
    for change in changes:
        variants = _variants(change, settings)
        if variants:
            settings = variants[-1].settings
            words.append(variants[-1].words)
    return words, settings


def _variants(change: Change, settings: Settings) -> list[_Variant]:
    return list(change(settings))


def _cheap_changes(plan: Plan, model: PlannedModel) -> list[Change]:
    """Return the changes that cost nothing but time, in the order of that cost."""
    changes: list[Change] = [_checkpointing]
    if plan.machine.device == "gpu" and model.meta_model._supports_flash_attn:
        changes.insert(0, _flash_attention)
    if model.can_tile and not plan.tiled and not plan.settings.is_baseline:
        changes.append(_tiled_logits)
    if plan.is_joined and plan.settings.accumulation == "layered":
        changes.append(_stashed_gradients)
    schedule, activations = partial(_schedule, plan.is_joined), partial(_offloaded_activations, plan.is_joined)
    return [*changes, _gather_by_module, _disable_prefetch, schedule, activations, _offload, _int8]


def _costly_changes(plan: Plan) -> list[Change]:
    """Return the changes that alter the training run or need other machines."""
    smaller_step = [_fewer_micro_batches] if plan.is_joined else []
    return [*smaller_step, _smaller_batch, _shorter, _more_gpus, *([_nvme] if plan.machine.nvme else [])]


def _flash_attention(settings: Settings) -> Iterator[_Variant]:
    if settings.masked and settings.attention != "eager" and settings.precision != "fp32":
        yield _Variant("--attn_implementation flash_attention_2", settings.but(attention="flash_attention_2"))


def _checkpointing(settings: Settings) -> Iterator[_Variant]:
    if not settings.gradient_checkpointing:
        yield _Variant("--gradient_checkpointing", settings.but(gradient_checkpointing=True))


def _tiled_logits(settings: Settings) -> Iterator[_Variant]:
    yield _Variant("--tiled_logits", settings.but(tiled_logits=True))


def _stashed_gradients(settings: Settings) -> Iterator[_Variant]:
    yield _Variant("accumulation stash", settings.but(accumulation="stash"))


def _gather_by_module(settings: Settings) -> Iterator[_Variant]:
    if not settings.is_baseline and not settings.resident and settings.gather_granularity != "module":
        yield _Variant("gather_granularity module", settings.but(gather_granularity="module"))


def _disable_prefetch(settings: Settings) -> Iterator[_Variant]:
    if not settings.resident and settings.max_live_parameters:
        limits = {"max_live_parameters": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 0}
        yield _Variant(
            "stage3_max_live_parameters, stage3_max_reuse_distance and stage3_prefetch_bucket_size 0",
            settings.but(**limits),
        )


def _schedule(is_joined: bool, settings: Settings) -> Iterator[_Variant]:
    if settings.is_baseline:
        return
    needs_stash = settings.accumulation_steps > 1 and not is_joined
    if not needs_stash and not settings.gradient_clipping and settings.precision != "fp16":
        if settings.update_schedule not in ("immediate", "auto"):
            yield _Variant("update_schedule immediate", settings.but(update_schedule="immediate"))
        return
    if settings.stash_device != "cpu" and settings.update_schedule != "two_pass":
        stash = {"update_schedule": "stash", "stash_device": "cpu"}
        yield _Variant("update_schedule stash with stash_device cpu", settings.but(**stash))
    if not needs_stash and settings.update_schedule != "two_pass":
        yield _Variant("update_schedule two_pass", settings.but(update_schedule="two_pass", stash_device="auto"))


def _offloaded_activations(is_joined: bool, settings: Settings) -> Iterator[_Variant]:
    recomputes = settings.gradient_checkpointing or is_joined
    if not settings.is_baseline and recomputes and not settings.activation_offload:
        needed = "" if settings.gradient_checkpointing else "--gradient_checkpointing with "
        offloaded = settings.but(gradient_checkpointing=True, activation_offload=True)
        yield _Variant(f"{needed}--activation_offload", offloaded)


def _offload(settings: Settings) -> Iterator[_Variant]:
    if settings.offload_param == "none":
        yield _Variant("parameters in host memory (offload_param cpu)", settings.but(offload_param="cpu"))


def _int8(settings: Settings) -> Iterator[_Variant]:
    if not settings.is_baseline and not settings.int8_weights and settings.offload_param != "nvme":
        yield _Variant("weights int8", settings.but(weights="int8"))


def _fewer_micro_batches(settings: Settings) -> Iterator[_Variant]:
    steps = settings.accumulation_steps
    while steps > 1:
        steps //= 2
        yield _Variant(f"--gradient_accumulation_steps {steps}", settings.but(accumulation_steps=steps))


def _smaller_batch(settings: Settings) -> Iterator[_Variant]:
    batch = settings.batch
    while batch > 1:
        batch //= 2
        yield _Variant(f"--per_device_train_batch_size {batch}", settings.but(batch=batch))


def _shorter(settings: Settings) -> Iterator[_Variant]:
    length = settings.sequence
    while length >= 256:
        length //= 2
        yield _Variant(f"--max_seq_length {length}", settings.but(sequence=length))


def _more_gpus(settings: Settings) -> Iterator[_Variant]:
    gpus = settings.gpus
    while 2 * gpus <= MAX_GPUS:
        gpus *= 2
        hosts = max(settings.hosts, gpus // GPUS_PER_HOST)
        yield _Variant(f"{gpus} GPUs", settings.but(gpus=gpus, hosts=hosts))


def _nvme(settings: Settings) -> Iterator[_Variant]:
    if settings.offload_param != "nvme" and not settings.int8_weights:
        yield _Variant("parameters on the disk (offload_param nvme)", settings.but(offload_param="nvme"))
