"""The training loop and the objectives, optimizers and checkpoints it uses."""
