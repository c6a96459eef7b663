"""corral: one recipe file takes a Llama-family model from your data to a served model, and proves each step."""

__version__ = "0.1.0"
