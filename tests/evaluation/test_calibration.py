"""Intervals of sampled answers cover what other seeds give."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from corral.answering.answerer import Answerer
from corral.answering.consensus import Consensus
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.evaluation.inference import Item, generate_answers
from corral.evaluation.row_file import RowFile, RowProducer
from corral.evaluation.scoring import Row, score_rows
from corral.evaluation.statistics import Estimate, estimate
from corral.messages import Conversation
from corral.template import Template

ROWS = [Item(f"row-{i}", Conversation.from_turns(("user", f"say {i}"), ("assistant", "A"))) for i in range(40)]
PROBABILITY = 0.43


@pytest.mark.parametrize("vote", [False, True], ids=["one answer", "a vote of three"])
def test_95_percent_intervals_of_sampled_answers_cover_the_truth_over_seeds(
    template: Template, tmp_path: Path, vote: bool
) -> None:
    (right,), (wrong,) = (template.tokenizer.encode(text, add_special_tokens=False) for text in "AB")

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        # As engines draw: one stream for each seed and choice, whatever the prompt.
        yield right if random.Random(f"{sampling.seed}:{choice}").random() < PROBABILITY else wrong

    async def accuracy(engine: ScriptedEngine, seed: int) -> Estimate:
        consensus = Consensus("majority", 3, stop="never") if vote else None
        answerer = Answerer(engine, template, Sampling(4, temperature=1.0, seed=seed), consensus=consensus)
        file, producer = RowFile(tmp_path / f"{seed}.jsonl"), RowProducer("tuned", "made")
        await generate_answers(answerer, producer, ROWS, file, lambda done: None)
        rows = [Row(id_, correct={"accuracy": row["answer"] == "A"}) for id_, row in file.rows_of(producer).items()]
        return estimate(score_rows("tuned", rows)["accuracy"].measure, seed=0)

    async def all_seeds() -> list[Estimate]:
        async with ScriptedEngine(reply) as engine:
            return [await accuracy(engine, seed) for seed in range(60)]

    estimates = asyncio.run(all_seeds())
    truth = PROBABILITY**2 * (3 - 2 * PROBABILITY) if vote else PROBABILITY
    covered = [(e.low or 0) <= truth <= (e.high or 0) for e in estimates]
    assert np.mean(covered) >= 0.87  # 0.95 less three standard errors
    spread, told = np.std([e.mean for e in estimates], ddof=1), np.mean([e.se or 0 for e in estimates])
    assert spread == pytest.approx(told, rel=0.3)
