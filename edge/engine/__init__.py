"""Runs a pack: the prefix cache, the forward and backward pass of the active blocks, the optimiser, evaluation."""
