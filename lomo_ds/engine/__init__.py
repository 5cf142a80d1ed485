"""DeepSpeed engines that average the loss over all tokens of a step: ``LomoEngine`` and the baselines."""
