"""Gradient processing: from the autograd hook, through reduction over the ranks, to the parameter update."""
