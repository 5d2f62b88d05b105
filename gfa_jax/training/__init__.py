"""Training: state, the compiled step, optimisers, checkpoints, and the loop."""
