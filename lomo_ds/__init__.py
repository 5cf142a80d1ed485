"""Full-parameter LOMO and AdaLomo fine-tuning inside DeepSpeed ZeRO-3 (arXiv 2306.09782, 2310.10195)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lomo_ds.engine.initialize import initialize
    from lomo_ds.engine.install import install
    from lomo_ds.engine.lomo import LomoEngine

__all__ = ["LomoEngine", "initialize", "install"]


def __getattr__(name: str) -> Any:
    """Import the engine on first use, because a program that handles signals must do so before torch is imported."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lomo_ds.engine import initialize, install, lomo

    return {"LomoEngine": lomo.LomoEngine, "initialize": initialize.initialize, "install": install.install}[name]
