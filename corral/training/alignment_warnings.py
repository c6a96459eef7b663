"""What may spoil a stage that aligns a model, as sentences, known before it trains: its settings and its rows.

Nothing here stops a stage: rows that cannot be used are refused by `stage_rows`, and a model that breaks by `guards`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from corral.data.ledger import FATES
from corral.data.mixture import SIDES
from corral.formatting import count_of
from corral.messages import Feedback, Preference
from corral.model.loading import load_tokenizer
from corral.training.mismatched_rows import MismatchedRows
from corral.training.objective_table import TAKES
from corral.training.single_answers import SingleAnswers

if TYPE_CHECKING:
    from corral.data.example_store import Example, ExampleStore
    from corral.data.prepare import Prepared
    from corral.recipe import Train
    from corral.training.stage_rows import StageRows

WARNINGS_FILE = "warnings.json"
"""In a stage's folder, the sentences."""

_HIGH_LR = {"lora": 5e-5, "full": 5e-6}
"""Learning rates of fine-tuning's size, by `method`."""
_LENGTH_GAP = 0.1
_MEASURED_ROWS = 2000
_NAMED_ROWS = 3


def settings_warnings(stage: Train, base: Path | None) -> list[str]:
    """Of the settings of a stage.

    Args:
        base: the folder of the base model, if the stage starts from that alone.
    """
    if stage.objective == "sft":
        return []
    warnings: list[str] = []
    if stage.optimizer.lr >= _HIGH_LR[stage.method]:
        warnings.append(
            f"`optimizer.lr` = {stage.optimizer.lr:g} is a rate for fine-tuning: with `{stage.objective}` it easily breaks a "
            f'large model, for which {_HIGH_LR[stage.method] / 10:g} is usual with `method` = "{stage.method}"; a small one '
            "may need more: watch what the guards measure"
        )
    if base is not None and stage.objective != "orpo" and load_tokenizer(base).chat_template is None:
        warnings.append(
            f"`{stage.objective}` starts from a base model without a chat template, which probably does not answer questions "
            'yet: put a stage with `objective` = "sft" before it, start from an instruct model, or use "orpo", which needs '
            "neither"
        )
    return warnings


def row_warnings(prepared: Prepared, stage: Train, rows: StageRows) -> list[str]:
    """Of the rows of a stage.

    Args:
        prepared: all rows; the labels in `sources` of the stage are theirs.
        rows: those of the stage.
    """
    if stage.objective == "sft":
        return []
    train = prepared.train.select(stage.sources, TAKES[stage.objective])
    return [
        *_length_gap(stage, rows.train),
        *_swapped_pairs(train),
        *_contradictions(rows.train),
        *_two_scores(stage, train),
        *_beyond_limit(prepared, stage, train),
        *_prompts_on_two_sides(prepared, stage, train),
    ]


def _length_gap(stage: Train, rows: Sequence[Example]) -> list[str]:
    chosen, rejected = list[int](), list[int]()
    for i in range(min(len(rows), _MEASURED_ROWS)):
        row = rows[i]
        lengths = [sum(sequence.trained) for sequence in row.sequences]
        if isinstance(row.record, Preference):
            chosen.append(lengths[0])
            rejected.append(lengths[1])
        elif isinstance(row.record, Feedback):
            (chosen if row.record.score >= stage.threshold else rejected).append(lengths[0])
    if not chosen or not rejected:
        return []
    better, worse = float(np.mean(chosen)), float(np.mean(rejected))
    if abs(better - worse) <= _LENGTH_GAP * min(better, worse):
        return []
    advice = "; `normalise = true` (with a larger β) divides by length" if stage.objective == "dpo" else ""
    return [
        f"better answers have {better:,.0f} tokens on average, worse ones {worse:,.0f}: the model learns to answer "
        f"{'at greater length' if better > worse else 'more briefly'} too{advice}"
    ]


def _swapped_pairs(rows: ExampleStore) -> list[str]:
    pairs = rows.select(types=[Preference])
    figures = pairs.sequence_figures()
    chosen, rejected = (figures.content[figures.place == place] for place in (0, 1))
    directed = [(better.tobytes(), worse.tobytes()) for better, worse in zip(chosen, rejected, strict=True)]
    known = set(directed)
    swapped = [i for i, (better, worse) in enumerate(directed) if (worse, better) in known]
    if not swapped:
        return []
    return [
        f"{_of(len(swapped), len(pairs), 'pair')} contradict another one, in which the same answers are swapped "
        f"({_names(pairs, swapped)}): nothing can be learnt from them"
    ]


def _contradictions(rows: Sequence[Example]) -> list[str]:
    answers = rows.answers if isinstance(rows, MismatchedRows) else rows
    if not isinstance(answers, SingleAnswers) or not answers.contradictory:
        return []
    some = "answer is" if answers.contradictory == 1 else "answers are"
    return [
        f"{answers.contradictory:,} {some} chosen in one pair and rejected in another, so neither good nor bad: left out of "
        "this stage (an objective of pairs, such as `dpo`, takes them)"
    ]


def _two_scores(stage: Train, rows: ExampleStore) -> list[str]:
    scored = rows.select(types=[Feedback])
    groups: dict[bytes, list[int]] = {}
    for number, content in enumerate(scored.sequence_figures().content if len(scored) else ()):
        groups.setdefault(content.tobytes(), []).append(number)

    def is_good(number: int) -> bool:
        record = scored[number].record
        return isinstance(record, Feedback) and record.score >= stage.threshold

    both = [group for group in groups.values() if len(group) > 1 and len(set(map(is_good, group))) > 1]
    if not both:
        return []
    return [
        f"{count_of(len(both), 'answer')} with scores on both sides of the threshold {stage.threshold:g} "
        f"({_names(scored, both[0])}): trained on as good and as bad ones, so nothing can be learnt from them"
    ]


def _beyond_limit(prepared: Prepared, stage: Train, rows: ExampleStore) -> list[str]:
    warnings: list[str] = []
    if cut := int((rows.fates == FATES.index("truncated")).sum()):
        warnings.append(f"{_of(cut, len(rows), 'row')} are cut to `data.max_length`: what is beyond counts for nothing")
    for label, source in prepared.ledger["sources"].items():
        if stage.sources is not None and label not in stage.sources:
            continue
        if not len(rows.select([label])):
            continue
        for reason, entry in source["reasons"].items():
            if reason.startswith("longer than"):
                warnings.append(f"{_of(entry['count'], source['rows'], 'row')} of {label} are left out: {reason}")
    return warnings


def _prompts_on_two_sides(prepared: Prepared, stage: Train, train: ExampleStore) -> list[str]:
    types = TAKES[stage.objective]
    stores = {"train": train} | {side: prepared.side(side).select(types=types) for side in SIDES[1:]}
    prompts = {
        side: {prompt.tobytes(): int(i) for prompt, i in zip(figures.prompt, figures.example, strict=True)}
        for side, figures in ((side, store.sequence_figures()) for side, store in stores.items())
    }
    warnings: list[str] = []
    for one, other in combinations(stores, 2):
        shared = sorted(prompts[one].keys() & prompts[other].keys())
        if shared:
            some = "prompt is" if len(shared) == 1 else "prompts are"
            names = _names(stores[one], [prompts[one][prompt] for prompt in shared])
            warnings.append(
                f"{len(shared):,} {some} on the sides `{one}` and `{other}` ({names}): give each side prompts of its own"
            )
    return warnings


def _of(count: int, total: int, what: str) -> str:
    return f"{count:,} of {total:,} {what}s"


def _names(rows: Sequence[Example], numbers: Sequence[int]) -> str:
    """Some rows as a user finds them."""
    some = [rows[i] for i in numbers[:_NAMED_ROWS]]
    more = " …" if len(numbers) > len(some) else ""
    return ", ".join(f"{row.source} row {row.index}" for row in some) + more
