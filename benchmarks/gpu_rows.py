"""Rows of random token ids for `gpu.py`: long documents, and rows with the lengths of R1's mix.

The lengths of the mix come from rows that `prepare.py` generates in the form of R1's ten data sets: 1.35 tokens per word, plus
some for the prompt's template, cut at 512.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import prepare

TOKENS_PER_WORD, FRAME, CUT = 1.35, 20, 512

Row: TypeAlias = tuple[tuple[int, ...], tuple[bool, ...]]
"""Token ids, and for each whether it is trained."""


def documents(count: int, length: int, vocabulary: int) -> list[Row]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [(tuple(rng.integers(3, vocabulary, length).tolist()), (True,) * length) for _ in range(count)]


def mix(count: int, vocabulary: int) -> list[Row]:
    """Rows of R1's sources in their proportions, shuffled."""
    import numpy as np

    rng = np.random.default_rng(0)
    names, weights = list(prepare.SOURCES), np.array(list(prepare.SOURCES.values()))
    text = prepare.TextGenerator(["word"] * 100, 0)
    rows: list[Row] = []
    for i, at in enumerate(rng.choice(len(names), count, p=weights / weights.sum())):
        prompt, answer = words(names[at], prepare.MAKE_ROW[names[at]](text, i))
        before = min(CUT - 8, FRAME + round(prompt * TOKENS_PER_WORD))
        after = min(CUT - before, 2 + round(answer * TOKENS_PER_WORD))
        ids = tuple(rng.integers(3, vocabulary, before + after).tolist())
        rows.append((ids, (False,) * before + (True,) * after))
    return rows


def words(source: str, row: dict[str, Any]) -> tuple[int, int]:
    """Words of the prompt and of the answer of a row of one of R1's sources."""
    fields = {
        "alpaca": (["instruction", "input"], "output"),
        "dolly": (["instruction", "context"], "response"),
        "gsm8k": (["question"], "answer"),
        "metamathqa": (["query"], "response"),
        "hotpot_qa": (["question", "context"], "answer"),
        "truthfulqa": (["Question"], "Best Answer"),
        "mmlu": (["question", "choices"], ""),
        "commonsense_qa": (["question", "choices"], ""),
        "trivia_qa": (["question"], ""),
    }
    if source == "hh-rlhf":
        prompt, _, answer = row["chosen"].rpartition("Assistant:")
        return len(prompt.split()), len(answer.split())
    inputs, output = fields[source]
    return sum(count(row[name]) for name in inputs), count(row[output]) if output else 3


def count(value: Any) -> int:
    if isinstance(value, str):
        return len(value.split())
    parts = value.values() if isinstance(value, dict) else value
    return sum(count(part) for part in parts)
