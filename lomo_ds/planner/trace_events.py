"""The trace of one training step: its events in order, and the bytes of activations alive around each of them."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from lomo_ds.simulate.program import Work


class EventKind(Enum):
    """Point of a step at which memory other than activations changes."""

    FETCH_FORWARD = "a module is about to run forward"
    FREE_FORWARD = "a module has run forward"
    FETCH_BACKWARD = "a module is about to run backward"
    FREE_BACKWARD = "a module has run backward"
    GRADIENT = "a parameter's full gradient has been computed"
    LOSS = "forward has ended"
    END = "backward has ended"


@dataclass(frozen=True)
class LiveActivations:
    """Activations alive at one instant.

    Attributes:
        sizes: bytes by tensor name.
        extrapolated_layers: number of layers that were not run and have left their activations by now.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    extrapolated_layers: int = 0


@dataclass(frozen=True)
class TraceEvent:
    """One event, and the activations alive up to it.

    Attributes:
        index: index of the module or of the parameter; -1 for an event of the whole step.
        peak: most activation bytes alive since the previous event.
        level: activation bytes alive now, without a gradient that has just been computed.
        logits: bytes of ``peak`` in tensors whose last dimension is the vocabulary; ``logits_level``, those of
            ``level``.
        kernels: how often each kernel has run since the previous event.
        live_at_peak: the activations that make up ``peak``; ``live``, those that make up ``level``.
    """

    kind: EventKind
    index: int
    peak: int
    level: int
    logits: int = 0
    logits_level: int = 0
    kernels: Counter[Work] = field(default_factory=Counter)
    live_at_peak: LiveActivations = field(default=LiveActivations(), compare=False)
    live: LiveActivations = field(default=LiveActivations(), compare=False)

    @property
    def flops(self) -> int:
        """Floating-point operations since the previous event."""
        return sum(count * work.flops for work, count in self.kernels.items())


@dataclass
class StepTrace:
    """The forward and backward pass of one micro-batch, or of all of a step that layered accumulation joins.

    Attributes:
        names: parameter names in the model's order; ``shapes``, their shapes.
        modules: indices of each module's own parameters, without those of its submodules; ``module_names``, the
            modules' names.
        layers: indices of the decoder layers in ``modules``.
        leaves: indices of the modules that are gathered whole, with their submodules.
        checkpoints: bytes of the input of each module that can keep its input only, by its index in ``modules``: of
            decoder layers, and with layered accumulation of the final norm.
        events: the events in order.
        buffers: bytes of the model's buffers.
        layer_of_module: index of the decoder layer that contains a module, by the module's index.
        tiled: whether logits are computed in tiles.
        bytes_per_layer: bytes by tensor name that one layer's forward leaves for backward; empty if every layer ran.
    """

    names: list[str]
    shapes: list[torch.Size]
    modules: list[list[int]] = field(default_factory=list)
    module_names: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    leaves: set[int] = field(default_factory=set)
    checkpoints: dict[int, int] = field(default_factory=dict)
    events: list[TraceEvent] = field(default_factory=list)
    buffers: int = 0
    layer_of_module: dict[int, int] = field(default_factory=dict)
    tiled: bool = False
    bytes_per_layer: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def numels(self) -> list[int]:
        """Number of elements of each parameter."""
        return [shape.numel() for shape in self.shapes]

    @property
    def numel(self) -> int:
        """Number of parameter elements of the model."""
        return sum(self.numels)

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of matrix products and attention in the forward pass."""
        forward = [event.kind for event in self.events].index(EventKind.LOSS) + 1
        return sum(event.flops for event in self.events[:forward])

    @property
    def flops(self) -> int:
        """The same of both passes, recomputation included."""
        return sum(event.flops for event in self.events)

    def sizes_of(self, live: LiveActivations) -> Counter[str]:
        """Return the bytes by name of live activations, including those of layers that were not run."""
        sizes = Counter(live.sizes)
        for name, size in self.bytes_per_layer.items():
            sizes[name] += live.extrapolated_layers * size
        return sizes

    def parameters_inside(self, module: int) -> list[int]:
        """Return the indices of the parameters of a module and of its submodules."""
        name = self.module_names[module]
        prefix = name + "." if name else ""
        return [p for p, parameter in enumerate(self.names) if parameter.startswith(prefix)]

    def by_layer(self) -> "StepTrace":
        """Return the trace as seen when each decoder layer is gathered whole: without the events of its submodules."""
        modules = list(self.modules)
        for module, layer in self.layer_of_module.items():
            modules[layer] = modules[layer] + self.modules[module]
        events: list[TraceEvent] = []
        dropped: TraceEvent | None = None  # the event with the highest peak among those dropped since the last one
        kernels = Counter[Work]()  # since the last event that is not dropped
        for event in self.events:
            kernels = kernels + event.kernels
            highest = event if dropped is None or event.peak > dropped.peak else dropped
            if event.kind is not EventKind.GRADIENT and event.index in self.layer_of_module:
                dropped = highest
                continue
            events.append(
                dataclasses.replace(
                    event,
                    peak=highest.peak,
                    logits=highest.logits,
                    live_at_peak=highest.live_at_peak,
                    kernels=kernels,
                )
            )
            dropped, kernels = None, Counter()
        return dataclasses.replace(self, modules=modules, leaves=self._gathered_whole(), events=events)

    def _gathered_whole(self) -> set[int]:
        """Return the layers, and the modules outside of them that have parameters and no submodules."""
        parents = {name.rpartition(".")[0] for name in self.module_names if name}
        others = {
            module
            for module, name in enumerate(self.module_names)
            if self.modules[module] and name not in parents and module not in self.layer_of_module
        }
        return self.layers | others
