"""Imported by the process that trials are forked from: what every one of them needs, so that it is loaded once.

Does nothing else; whoever imports it pays for torch, transformers and peft.
"""

from __future__ import annotations

import importlib

from corral.model.loading import quiet

NEEDED = (
    "peft",
    "transformers.models.llama.modeling_llama",
    "corral.model.packed_forward",
    "corral.template",
    "corral.training.loop",
    "corral.training.trained_model",
)

with quiet():  # bitsandbytes, which peft imports where it is installed, has advice to give
    for name in NEEDED:
        importlib.import_module(name)
