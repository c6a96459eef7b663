"""Sentence embeddings are the model's, whatever is in a batch."""

from __future__ import annotations

import numpy as np

from corral.engines.embedding import Embedder

TEXTS = ["How do I boil an egg?", "cooking eggs in water", "The stock market fell.", "", "egg " * 600]


def test_vectors_have_length_one_do_not_depend_on_the_batch_and_know_meaning() -> None:
    embed = Embedder()
    together = embed(TEXTS)
    assert together.shape == (5, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    for i, text in enumerate(TEXTS):
        np.testing.assert_allclose(embed([text])[0], together[i], atol=1e-5)
    likeness = together @ together.T
    assert likeness[0, 1] > 0.6 > 0.2 > likeness[0, 2]
    assert embed([]).shape == (0, 384)
