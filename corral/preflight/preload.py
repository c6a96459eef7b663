"""Imports what every trial needs, in the process that trials are forked from, so that it is loaded once."""

from __future__ import annotations

import importlib

from corral.model.loading import quiet

MODULES = (
    "peft",
    "transformers.models.llama.modeling_llama",
    "corral.export.contract",
    "corral.model.packed_forward",
    "corral.template",
    "corral.training.loop",
    "corral.training.trained_model",
)

with quiet():  # bitsandbytes, which peft imports where it is installed, prints advice
    for name in MODULES:
        importlib.import_module(name)
