"""Sentence embeddings: texts → unit vectors whose dot product is the similarity of meaning.

The model is all-MiniLM-L6-v2 (an asset; Reimers & Gurevych 2019, arXiv 1908.10084), computed by transformers on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ASSET = "all-minilm-l6-v2"
MAX_TOKENS = 256
"""Tokens of a text that are used, with the special ones around it; the model was trained on no longer texts."""
WINDOW = MAX_TOKENS - 2
"""The same without the special tokens."""
VOCABULARY = 30_522
"""Ids of its tokenizer are below this."""
MAX_CHARACTERS = 2**16
"""Characters of a text that are read: more than any 256 tokens of a language have."""
DIMENSIONS = 384
"""Length of a vector."""
_BATCH = 32


class Embedder:
    """The model, loaded at the first call. Safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """[n, 384] unit vectors, in the order of the n texts. Raises: AssetError (the model cannot be fetched)."""
        return self.embed_ids([ids[:WINDOW] for ids in self.tokenize([text[:MAX_CHARACTERS] for text in texts])])

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, without the special tokens around it. Raises: AssetError."""
        with self._lock:
            tokenizer, _ = self._load()
            return tokenizer([*texts], add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def embed_ids(self, windows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """[n, 384] unit vectors of n lists of at most `WINDOW` ids, in their order. Raises: AssetError."""
        import torch

        with self._lock:
            tokenizer, model = self._load()
            vectors = np.empty((len(windows), model.config.hidden_size))
            # Sorted by length, so that little is padding.
            order = sorted(range(len(windows)), key=lambda i: len(windows[i]))
            for start in range(0, len(order), _BATCH):
                indices = order[start : start + _BATCH]
                ids = [[tokenizer.cls_token_id, *windows[i], tokenizer.sep_token_id] for i in indices]
                batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", verbose=False)
                with torch.inference_mode():
                    hidden = model(**batch).last_hidden_state
                weights = batch["attention_mask"].unsqueeze(-1)
                mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
                vectors[indices] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors

    def _load(self) -> tuple[Any, Any]:
        self._loaded = self._loaded or _load_model()
        return self._loaded


def _load_model() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    from corral.assets import fetch

    folder = fetch(ASSET).path
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype="float32")
        return AutoTokenizer.from_pretrained(folder, local_files_only=True), model.eval()
    finally:
        if was_enabled:
            logging.enable_progress_bar()
