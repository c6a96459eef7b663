"""Imports that take seconds, done once by the server process that the others are forked from."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import bitsandbytes  # noqa: F401
import gguf  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import nltk.stem.porter  # noqa: F401
import pandas  # noqa: F401  (pyarrow imports it if it is there)
import peft  # noqa: F401
import rich.table  # noqa: F401
import sacrebleu  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import corral.cli
import corral.pipeline.execution
import corral.report.write  # noqa: F401
import tests.invariants.work  # noqa: F401
from corral.report import plots
from tests import unrendered

plots._picture = unrendered.picture
gc.freeze()  # collections in the other processes need not look at what was imported
