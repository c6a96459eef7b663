"""Rows made up for tests, and scorecards of them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from corral.evaluation.scorecard import Scorecard, build_scorecard
from corral.evaluation.scoring import Row, VariantRows

TEXT = "boil the rice in salted water then drain it and stir in butter peas and two beaten eggs until set"
WORDS = TEXT.split()
TEXT_METRICS = ("rouge1", "rouge2", "rougeL", "bleu")


def make_rows(quality: float, *, seed: int, count: int = 40) -> list[Row]:
    """Rows whose references and tokens depend on their number only; a higher quality answers closer at less loss."""
    noise = random.Random(seed)
    rows: list[Row] = []
    for number in range(count):
        fixed = random.Random(number)
        reference = fixed.choices(WORDS, k=20)
        answer = [word if noise.random() < quality else noise.choice(WORDS) for word in reference]
        tokens = fixed.randrange(10, 40)
        nll = tokens * (fixed.uniform(2, 3) - quality + noise.gauss(0, 0.1))
        rows.append(Row(f"row-{number:02}", nll, tokens, " ".join(reference), " ".join(answer)))
    return rows


def make_graded_rows(accuracy: float, *, seed: int, count: int = 60) -> list[Row]:
    """Rows of a task of choices; each is answered correctly with this probability."""
    rng = random.Random(seed)
    return [
        Row(
            f"q-{n:02}",
            correct={"accuracy": rng.random() < accuracy, "logprob": n % 3 == 0, "logprob_byte": n % 2 == 0},
        )
        for n in range(count)
    ]


@pytest.fixture(scope="session")
def card() -> Scorecard:
    """Two variants on rows of their own."""
    info = {"tokens": 800.0, "seconds": 2.5, "tokens_per_second": 320.0}
    variants = {"base": VariantRows(make_rows(0.4, seed=1)), "tuned": VariantRows(make_rows(0.8, seed=2), info)}
    return build_scorecard(variants, baseline="base", seed=3)


@pytest.fixture(scope="session")
def task_card() -> Scorecard:
    """Four variants on rows of their own, a task of choices and a task of texts; `shots` has no loss."""
    quality = {"base": 0.3, "tuned": 0.5, "shots": 0.9, "int8": 0.5}
    info = {"answers": 40.0, "prompt_tokens": 400.0, "answer_tokens": 200.0, "seconds": 8.0, "answers_per_second": 5.0}
    info |= {f"mmlu/{key}": value for key, value in info.items()}
    variants: dict[str, VariantRows] = {}
    for seed, (name, value) in enumerate(quality.items()):
        rows = make_rows(value, seed=seed)
        if name == "shots":
            rows = [replace(row, nll=None, tokens=None) for row in rows]
        tasks = {"mmlu": make_graded_rows(value, seed=seed), "xsum": make_rows(value, seed=10 + seed, count=20)}
        variants[name] = VariantRows(rows, info, tasks)
    return build_scorecard(variants, baseline="base", compared_with={"shots": "tuned", "int8": "tuned"}, seed=3)
