"""Full-parameter LOMO fine-tuning inside DeepSpeed ZeRO-3 (arXiv 2306.09782)."""

from lomo_ds.engine import LomoEngine, initialize

__all__ = ["LomoEngine", "initialize"]
