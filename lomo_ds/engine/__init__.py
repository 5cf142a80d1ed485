"""DeepSpeed engines whose step averages the loss over the tokens of a whole batch: LOMO's, and the baselines'."""
