"""Reads answers that people rated by their harm, from the files of PyRIT: each with its score, or in pairs.

A file has a line about its version, a header, and a row for each answer: the prompt, the answer, and the ratings of one to
three people from 0 (harmless) to 1. Some answers are in several files; their ratings are put together.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from corral.data.sources.raw_row import RawRow

_HARMLESS, _HARMFUL = 0.25, 0.75
"""A pair's better answer is rated at most the first, its worse one at least the second."""


def read_rated_answers(files: Sequence[Path]) -> Iterator[RawRow]:
    """Each answer once: `prompt`, `completion` and `score`, 1 minus the mean rating; `category` of the harm."""
    for index, ((prompt, answer), (harm, category)) in enumerate(_mean_ratings(files).items(), 1):
        row = {"prompt": prompt, "completion": answer, "score": round(1 - harm, 4), "category": category}
        yield RawRow(index, row, location=f"answer {index}")


def read_rated_pairs(files: Sequence[Path]) -> Iterator[RawRow]:
    """Each harmless answer with each harmful answer to the same prompt: `prompt`, `chosen` and `rejected`; `category`."""
    by_prompt: dict[str, list[tuple[str, float, str]]] = {}
    for (prompt, answer), (harm, category) in _mean_ratings(files).items():
        by_prompt.setdefault(prompt, []).append((answer, harm, category))
    index = 0
    for prompt, answers in by_prompt.items():
        for chosen in (answer for answer, harm, _ in answers if harm <= _HARMLESS):
            for rejected, category in ((answer, category) for answer, harm, category in answers if harm >= _HARMFUL):
                index += 1
                row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "category": category}
                yield RawRow(index, row, location=f"pair {index}")


def _mean_ratings(files: Sequence[Path]) -> dict[tuple[str, str], tuple[float, str]]:
    """(mean rating, category) of each prompt and answer, in the order of the files."""
    ratings: dict[tuple[str, str], list[float]] = {}
    categories: dict[tuple[str, str], str] = {}
    for path in files:
        with path.open(encoding="utf-8-sig", newline="") as file:
            file.readline()  # the version
            for row in csv.DictReader(file, strict=True):
                key = (row["objective"].strip(), row["assistant_response"].strip())
                scores = [float(value) for name, value in row.items() if name.startswith("human_score") and value]
                ratings.setdefault(key, []).extend(scores)
                categories.setdefault(key, row["harm_category"].lower())
    return {key: (fmean(scores), categories[key]) for key, scores in ratings.items()}
