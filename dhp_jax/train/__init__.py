"""The training loop, its step, its state and its checkpoints."""
