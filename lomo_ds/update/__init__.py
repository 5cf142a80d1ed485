"""The way of a gradient: from the hook that takes it from autograd, over its reduction, to the weights it changes."""
