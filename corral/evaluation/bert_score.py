"""BERTScore (Zhang et al. 2020, arXiv 1904.09675): F1 of the best cosine matches between contextual vectors of tokens.

The package bert-score computes it. It rescales scores, X → (X − b) / (1 − b), where it has the baseline b of the model for
English; for any other model the scores are said not to be rescaled. Only scores with the same signature can be compared.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from corral.errors import InputError, require
from corral.recipe.evaluate import BertScore

_LANGUAGE = "en"  # of the baselines


class BertScorer:
    """Scores answers by a model that reads text, loaded at the first call.

    Args:
        settings: `[evaluate.bertscore]`.
    """

    def __init__(self, settings: BertScore) -> None:
        self.settings = settings

    def score(self, references: Sequence[Sequence[str]], candidates: Sequence[str]) -> NDArray[np.float64]:
        """[n] F1 of n candidates, each the best over its references; 0 before rescaling where one of the texts is empty.

        Raises: MissingExtraError, InputError (the model cannot be loaded), AssetError.
        """
        pairs = [(i, other, text) for i, text in enumerate(candidates) for other in references[i]]
        empty = (0 - self._baseline) / (1 - self._baseline)
        scores = np.full(len(candidates), empty)
        in_words = [(i, other, text) for i, other, text in pairs if other.strip() and text.strip()]
        if in_words:
            rows, others, texts = zip(*in_words, strict=True)
            values = self._scorer.score(list(texts), list(others))[2].double().numpy()
            np.maximum.at(scores, np.array(rows), values)
        return scores

    @cached_property
    def signature(self) -> str:
        """bert-score's hash, with the model by the name in the settings, and whether the scores are rescaled."""
        scorer = self._scorer
        code = str(scorer.hash).replace(str(scorer.model_type), self.settings.model, 1)
        return code if self._is_rescaled else f"{code}|not rescaled: compare with scores of this model only"

    @property
    def _is_rescaled(self) -> bool:
        return has_baseline(self.settings.model)

    @cached_property
    def _baseline(self) -> float:
        return float(self._scorer.baseline_vals[2]) if self._is_rescaled else 0.0

    def check(self) -> None:
        """Raises MissingExtraError, InputError or AssetError if the model or its layer is not there; reads no weights."""
        _ = self._model_and_layer

    @cached_property
    def _model_and_layer(self) -> tuple[str, int]:
        """What bert-score loads: a folder or a name on the hub, and the number of layers that are computed."""
        known: dict[str, int] = require("bert_score.utils", "rag").model2layers
        model = _resolve(self.settings.model)
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(model)
            layers = int(config.num_hidden_layers)
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(
                f"no model can be read from {self.settings.model!r}: {error}",
                where="evaluate.bertscore.model",
                hint="give a folder of an encoder in transformers' format, or asset:all-minilm-l6-v2",
            ) from None
        if "t5" in model and "t5" not in config.model_type:
            # bert-score would load it as a T5 model, whose weights it then makes up.
            raise InputError(
                f"bert-score takes {model!r} for a T5 model, because of the letters t5, and it is a {config.model_type} model",
                where="evaluate.bertscore.model",
                hint="move or link the folder to a path without t5",
            )
        layer = self.settings.layer or known.get(model, max(1, layers - 1))
        if layer > layers:
            raise InputError(
                f"{self.settings.model!r} has {layers} layers, and BERTScore is to use layer {layer}",
                where="evaluate.bertscore.layer",
                hint=f"give a number from 1 to {layers}, or leave it out",
            )
        return model, layer

    @cached_property
    def _scorer(self) -> Any:
        model, layer = self._model_and_layer
        with _quiet():
            return require("bert_score", "rag").BERTScorer(
                model_type=model, num_layers=layer, lang=_LANGUAGE, rescale_with_baseline=self._is_rescaled
            )


def has_baseline(model: str) -> bool:
    """Whether bert-score has the English baseline of a model, by its name on the hub. Raises: MissingExtraError."""
    folder = Path(require("bert_score", "rag").__file__).parent / "rescale_baseline" / _LANGUAGE
    return model in {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.tsv")}


def _resolve(model: str) -> str:
    """A folder, or a name on the hub, for a model as the settings name it."""
    from corral.assets import fetch

    kind, _, name = model.partition(":")
    if kind == "asset":
        return str(fetch(name).path)
    return name if kind == "hub" else model


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' progress bars."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
