"""The smallest change that makes a plan fit: one alone before several together, cheap ones before dear ones."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice

from lomo_ds.errors import ConfigError
from lomo_ds.planner.plan import Plan, PlannedModel, plan
from lomo_ds.planner.settings import Settings

MOST_GPUS, GPUS_OF_A_HOST = 64, 8


@dataclass(frozen=True)
class Advice:
    """Changes that make a plan fit, and the plan with them.

    Attributes:
        changes: in words.
        plan: that fits.
    """

    changes: tuple[str, ...]
    plan: Plan

    def __str__(self) -> str:
        """In one sentence, without its end."""
        *some, last = self.changes
        told = f"{', '.join(some)} and {last}" if some else last
        return f"it fits with {told}: {self.plan}"


@dataclass(frozen=True)
class _Variant:
    words: str
    settings: Settings


Change = Callable[[Settings], Iterator[_Variant]]
Attempt = Callable[[Settings], Plan | None]  # None where settings cannot be


def advise(found: Plan, model: PlannedModel) -> Advice | None:
    """The smallest change with which ``found`` fits; None if it fits as it is, or with nothing known here."""
    if found.fits:
        return None

    @cache  # changes that change nothing further lead to the same settings again
    def attempt(settings: Settings) -> Plan | None:
        try:
            return plan(model, settings, found.machine)
        except ConfigError:
            return None

    free, dear = _free_changes(found, model), _dear_changes(found)
    pairs = sorted(combinations(range(len(free)), 2), key=sum)
    for change in (*free, *dear):
        fitting = _mildest(found, attempt, [_first_variant(change)])
        if fitting is not None:
            return fitting
    for one, other in pairs:
        fitting = _mildest(found, attempt, [free[one], free[other]])
        if fitting is not None:
            return fitting
    return _several(found, attempt, [*free, *dear])


def _several(found: Plan, attempt: Attempt, changes: list[Change]) -> Advice | None:
    """One after another, as far as they help, until it fits; then without those not needed, the dearest first."""
    chosen: list[Change] = []
    least = _lack(found)
    for change in changes:
        fitting = _mildest(found, attempt, [*chosen, change])
        if fitting is None:
            tried = attempt(_apply(found.settings, [*chosen, change])[1])
            if tried is not None and _lack(tried) < least:
                chosen, least = [*chosen, change], _lack(tried)
            continue
        needed = [*chosen, change]
        for superfluous in reversed(chosen):
            fewer = [other for other in needed if other is not superfluous]
            without = _mildest(found, attempt, fewer)
            if without is not None:
                needed, fitting = fewer, without
        return fitting
    return None


def _lack(found: Plan) -> int:
    """Bytes that are missing, on a GPU and on a host."""
    on_gpu = found.gpu_bytes - found.machine.gpu_memory
    return max(0, on_gpu) + max(0, found.host_bytes - found.usable_host_bytes)


def _first_variant(change: Change) -> Change:
    """The mildest form of a change alone: half a batch, not a sixteenth of it."""
    return lambda settings: islice(change(settings), 1)


def _mildest(found: Plan, attempt: Attempt, changes: list[Change]) -> Advice | None:
    """All of ``changes``, the last as mild as fits, those before it as far as they go."""
    *before, last = changes
    words, settings = _apply(found.settings, before)
    for variant in _possible(last, settings):
        tried = attempt(variant.settings)
        if tried is not None and tried.fits:
            return Advice((*words, variant.words), tried)
    return None


def _apply(settings: Settings, changes: list[Change]) -> tuple[list[str], Settings]:
    """Changes as far as they go, in words and done."""
    words = []
    for change in changes:
        variants = _possible(change, settings)
        if variants:
            settings = variants[-1].settings
            words.append(variants[-1].words)
    return words, settings


def _possible(change: Change, settings: Settings) -> list[_Variant]:
    return list(change(settings))


def _free_changes(found: Plan, model: PlannedModel) -> list[Change]:
    """Those that cost time at most, in the order of how much."""
    changes: list[Change] = [_checkpointing]
    if model.can_tile and not found.tiled and found.settings.optimizer == "lomo":
        changes.append(_tiled_logits)
    return [*changes, _finer_gathering, _leaner_gathering, _schedule, _offloaded_activations, _offload, _int8]


def _dear_changes(found: Plan) -> list[Change]:
    """Those that make another run of it, or need other machines."""
    return [_smaller_batch, _shorter, _more_gpus, *([_nvme] if found.machine.nvme else [])]


def _checkpointing(settings: Settings) -> Iterator[_Variant]:
    if not settings.gradient_checkpointing:
        yield _Variant("--gradient_checkpointing", settings.but(gradient_checkpointing=True))


def _tiled_logits(settings: Settings) -> Iterator[_Variant]:
    yield _Variant("--tiled_logits", settings.but(tiled_logits=True))


def _finer_gathering(settings: Settings) -> Iterator[_Variant]:
    if settings.optimizer == "lomo" and not settings.resident and settings.gather_granularity != "module":
        yield _Variant("gather_granularity module", settings.but(gather_granularity="module"))


def _leaner_gathering(settings: Settings) -> Iterator[_Variant]:
    if not settings.resident and settings.max_live_parameters:
        lean = {"max_live_parameters": 0, "max_reuse_distance": 0, "prefetch_bucket_size": 0}
        yield _Variant(
            "stage3_max_live_parameters, stage3_max_reuse_distance and stage3_prefetch_bucket_size 0",
            settings.but(**lean),
        )


def _schedule(settings: Settings) -> Iterator[_Variant]:
    if settings.optimizer != "lomo":
        return
    if settings.accumulation == 1 and not settings.gradient_clipping and settings.precision != "fp16":
        if settings.update_schedule not in ("immediate", "auto"):
            yield _Variant("update_schedule immediate", settings.but(update_schedule="immediate"))
        return
    if settings.stash_device != "cpu" and settings.update_schedule != "two_pass":
        stash = {"update_schedule": "stash", "stash_device": "cpu"}
        yield _Variant("update_schedule stash with stash_device cpu", settings.but(**stash))
    if settings.accumulation == 1 and settings.update_schedule != "two_pass":
        yield _Variant("update_schedule two_pass", settings.but(update_schedule="two_pass", stash_device="auto"))


def _offloaded_activations(settings: Settings) -> Iterator[_Variant]:
    if settings.optimizer == "lomo" and settings.gradient_checkpointing and not settings.activation_offload:
        yield _Variant("--activation_offload", settings.but(activation_offload=True))


def _offload(settings: Settings) -> Iterator[_Variant]:
    if settings.offload_param == "none":
        yield _Variant("parameters in host memory (offload_param cpu)", settings.but(offload_param="cpu"))


def _int8(settings: Settings) -> Iterator[_Variant]:
    if settings.optimizer == "lomo" and not settings.int8_weights and settings.offload_param != "nvme":
        yield _Variant("weights int8", settings.but(weights="int8"))


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
    while 2 * gpus <= MOST_GPUS:
        gpus *= 2
        hosts = max(settings.hosts, gpus // GPUS_OF_A_HOST)
        yield _Variant(f"{gpus} GPUs", settings.but(gpus=gpus, hosts=hosts))


def _nvme(settings: Settings) -> Iterator[_Variant]:
    if settings.offload_param != "nvme" and not settings.int8_weights:
        yield _Variant("parameters on the disk (offload_param nvme)", settings.but(offload_param="nvme"))
