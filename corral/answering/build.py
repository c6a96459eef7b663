"""Builds an Answerer from an engine, a template and the `[answer]` table of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.answering.examples import source_examples
from corral.engines.base import Engine, Sampling
from corral.engines.embedding import Embedder
from corral.errors import DataError
from corral.messages import Conversation
from corral.prompting.few_shot import Prompting
from corral.recipe import Answer
from corral.template import Template


def build_answerer(
    engine: Engine,
    template: Template,
    settings: Answer,
    *,
    examples: Callable[[], Sequence[Conversation]],
    seed: int | None,
    embed: Embedder | None = None,
) -> Answerer:
    """An Answerer with the prompting, consensus and sampling of `[answer]`. Embedding models are loaded when first needed.

    Args:
        examples: returns answered conversations for few-shot prompting; only called if the settings want examples and name
            no source of them.
        seed: of all sampling, and of the choice of examples; None samples anew each time.
        embed: texts → vectors, where needed; by default a new Embedder.

    Raises:
        DataError: there are no examples to show.
        AssetError: a source of examples cannot be read.
    """
    embedder = embed or Embedder()
    shots, vote = settings.shots, settings.consensus
    prompting = consensus = None
    if shots.count or settings.reasoning:
        known = () if not shots.count else examples() if shots.source is None else source_examples(shots.source)
        prompting = Prompting(
            known, shots.count, shots.choose, reasoning=settings.reasoning, embed=embedder, seed=seed or 0
        )
        if shots.count and not prompting.example_count:
            raise DataError(
                "there are no examples of one question and one answer to show",
                where="answer.shots" if shots.source is None else shots.source.label,
                hint="name rows with [answer.shots.source], or set answer.shots.count to 0",
            )
    if vote.method != "none":
        consensus = Consensus(vote.method, vote.n, vote.temperature, vote.top_p, vote.stop, embedder)
    sampling = Sampling(settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p, seed=seed)
    return Answerer(engine, template, sampling, prompting=prompting, consensus=consensus)
