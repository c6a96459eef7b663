"""The training loop and what is injected into it."""
