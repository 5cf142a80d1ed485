"""What a rehearsal has found: when which bytes of activations are alive, between the events of a step."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Event(Enum):
    """What happens between two stretches of computation."""

    FETCH_FORWARD = "a module is about to run forward"
    FREE_FORWARD = "it has run forward"
    FETCH_BACKWARD = "a module is about to run backward"
    FREE_BACKWARD = "it has run backward"
    GRADIENT = "a parameter's gradient is whole"
    LOSS = "forward has ended"
    END = "backward has ended"


@dataclass(frozen=True)
class Alive:
    """Activations at one instant: bytes by name, and how many layers more than were run have left theirs."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    more_layers: int = 0


@dataclass(frozen=True)
class Moment:
    """An event, and the activations up to it.

    Attributes:
        index: of the module, or of the parameter.
        peak: the most bytes alive since the moment before.
        level: bytes alive now; a gradient that has just arrived is not among them.
        logits: of ``peak``, tensors as wide as the vocabulary; ``logits_level``, of ``level``.
        flops: so far.
        alive: what makes up ``peak``; ``alive_level``, what makes up ``level``.
    """

    event: Event
    index: int
    peak: int
    level: int
    logits: int = 0
    logits_level: int = 0
    flops: int = 0
    alive: Alive = field(default=Alive(), compare=False)
    alive_level: Alive = field(default=Alive(), compare=False)


@dataclass
class Rehearsal:
    """A micro-batch's forward and backward.

    Attributes:
        names: of the parameters, in the model's order; ``numels``, theirs.
        modules: the parameters of each module, those of modules below it left out; ``module_names``, their names.
        layers: of ``modules``, the decoder layers.
        checkpoints: bytes of each decoder layer's input, by its number in ``modules``.
        moments: in their order.
        buffers: bytes of what the model holds beside parameters.
        inside: the decoder layer that a module is in, by their numbers in ``modules``.
        flops: of matrix products and attention, as they are executed: with recomputation, where there is any.
        forward_flops: of them, before the loss is known.
        tiled: whether logits are computed a tile at a time.
        left_by_layer: bytes by name that forward through a layer leaves for backward, where not all were run.
    """

    names: list[str]
    numels: list[int]
    modules: list[list[int]] = field(default_factory=list)
    module_names: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)
    checkpoints: dict[int, int] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)
    buffers: int = 0
    inside: dict[int, int] = field(default_factory=dict)
    flops: int = 0
    forward_flops: int = 0
    tiled: bool = False
    left_by_layer: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def numel(self) -> int:
        """Parameters of the model."""
        return sum(self.numels)

    def sizes_of(self, alive: Alive) -> Counter[str]:
        """Bytes by name of all that is alive, the layers that were not run included."""
        found = Counter(alive.sizes)
        for name, size in self.left_by_layer.items():
            found[name] += alive.more_layers * size
        return found

    def by_layer(self) -> "Rehearsal":
        """The same where a decoder layer is gathered as a whole, and what is in it gives no sign."""
        modules = list(self.modules)
        for module, layer in self.inside.items():
            modules[layer] = modules[layer] + self.modules[module]
        moments: list[Moment] = []
        hidden: Moment | None = None  # the highest of those that give no sign
        for moment in self.moments:
            highest = moment if hidden is None or moment.peak > hidden.peak else hidden
            if moment.event is not Event.GRADIENT and moment.index in self.inside:
                hidden = highest
                continue
            moments.append(dataclasses.replace(moment, peak=highest.peak, logits=highest.logits, alive=highest.alive))
            hidden = None
        return dataclasses.replace(self, modules=modules, moments=moments)
