"""Imports that take seconds, done once by the server process that the others are forked from."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import bitsandbytes  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import corral.cli
import corral.pipeline.execution  # noqa: F401
import tests.invariants.work  # noqa: F401
