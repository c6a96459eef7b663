"""From the recipe's `[answer]` to an Answerer: examples are read, embeddings and votes are set up.

What has to be loaded is loaded when it is first used. It does not know how examples are chosen or votes are counted, nor what
the answers are for.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.engines.base import Engine, Sampling
from corral.engines.embedding import Embedder
from corral.errors import DataError
from corral.messages import Conversation, Record
from corral.progress import Progress
from corral.prompting.few_shot import POOL, Prompting
from corral.recipe import Answer, Source
from corral.recipe.answer import Shots
from corral.run.directory import Run
from corral.template import Template


def compose(
    engine: Engine,
    template: Template,
    settings: Answer,
    *,
    examples: Callable[[], Sequence[Conversation]],
    seed: int | None,
    embed: Embedder | None = None,
) -> Answerer:
    """An Answerer that asks and chooses as `[answer]` says.

    Args:
        examples: gives answered conversations for few-shot prompting where the settings name no source of them; only called
            then.
        seed: of all sampling, and of the choice of examples; None draws anew each time.
        embed: texts → vectors, where they are needed; by default one of its own.

    Raises:
        DataError: there are no examples to show.
        AssetError: a source of examples cannot be had.
    """
    embedder = embed or Embedder()
    shots, consensus = settings.shots, settings.consensus
    prompting = None
    if shots.count or settings.reasoning:
        known = () if not shots.count else examples() if shots.source is None else examples_in(shots.source)
        prompting = Prompting(
            known, shots.count, shots.choose, reasoning=settings.reasoning, embed=embedder, seed=seed or 0
        )
        if shots.count and not prompting.examples:
            raise DataError(
                "there are no examples of one question and one answer to show",
                where="answer.shots" if shots.source is None else shots.source.label,
                hint="name rows with [answer.shots.source], or set answer.shots.count to 0",
            )
    vote = None
    if consensus.method != "none":
        vote = Consensus(
            consensus.method, consensus.n, consensus.temperature, consensus.top_p, consensus.stop, embedder
        )
    sampling = Sampling(settings.max_tokens, temperature=settings.temperature, top_p=settings.top_p, seed=seed)
    return Answerer(engine, template, sampling, prompting=prompting, consensus=vote)


def training_examples(run: Run, seed: int) -> list[Conversation]:
    """Some of the rows that a run trained on, for few-shot prompting. Raises: DataError (it has prepared none)."""
    from corral.data.prepare import Prepared

    rows = Prepared.open(run.path / "prepare").train
    drawn = random.Random(seed).sample(range(len(rows)), min(len(rows), 2 * POOL))
    return _conversations(rows[i].record for i in sorted(drawn))


def examples_identity(shots: Shots) -> str:
    """What the examples of a source depend on besides the settings, as a hash; empty where no source's are shown.

    Raises: DataError, AssetError.
    """
    if not shots.count or shots.source is None:
        return ""
    from corral.data.sources import hash_source

    return hash_source(shots.source)


def training_identity(run: Run) -> str:
    """The same for `training_examples`. Raises: DataError (the run has prepared none)."""
    path = run.path / "prepare" / "stage.json"
    try:
        return json.loads(path.read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the run has no prepared rows to show as examples: {error!r}",
            where=str(path),
            hint="finish the run, or name rows with [answer.shots.source]",
        ) from None


def examples_in(source: Source) -> list[Conversation]:
    """The conversations of a source's first rows. Raises: DataError, AssetError, StorageError."""
    import numpy as np

    from corral.data import cache
    from corral.data.source_rows import load_source_rows

    rows = load_source_rows(source, cache.default_folder(), Progress())
    most = min(len(rows), source.rows or 2 * POOL)
    return _conversations(rows.records(np.arange(most)))


def _conversations(records: Iterable[Record]) -> list[Conversation]:
    return [record for record in records if isinstance(record, Conversation)]
