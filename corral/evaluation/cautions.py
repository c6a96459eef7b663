"""What to know before the figures of variants are read: what differs between them besides the model, which rows have no score,
and which metric a vote was made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from corral.answering.identity import HASHED, differing_conditions
from corral.evaluation.scoring import MetricColumns, VariantRows

ROUGE_VOTES = ("rouge-l", "rouge-l+math")
"""Votes that choose answers by ROUGE-L."""
_WITHOUT_DIGITS = str.maketrans("", "", "0123456789")


def row_cautions(name: str, rows: VariantRows, columns: MetricColumns) -> Iterator[str]:
    """Sentences about the rows of a variant that have no score."""
    skipped = [
        (metric.rpartition("/")[0], column.source, column.skipped, len(column.ids))
        for metric, column in columns.items()
    ]
    scored = {(task, source) for task, source, _, _ in skipped}
    # Sets of which every row was skipped have no column.
    for task, task_rows in {"": rows.rows, **rows.tasks}.items():
        for source in dict.fromkeys(source for row in task_rows for source in row.skipped):
            if (task, source) not in scored:
                skipped.append(
                    (task, source, {row.id: row.skipped[source] for row in task_rows if source in row.skipped}, 0)
                )
    if not columns and not skipped:
        yield f"{name} has no scores: there are no rows to measure it on"
    said: set[tuple[str, str, str]] = set()
    for task, source, reasons, scores in skipped:
        for id_, reason in reasons.items():
            kind = reason.translate(_WITHOUT_DIGITS)
            if (task, source, kind) in said:
                continue
            said.add((task, source, kind))
            count = sum(other.translate(_WITHOUT_DIGITS) == kind for other in reasons.values())
            yield (
                f"{name}: {count} of {scores + len(reasons)} rows of {task or 'the test rows'} have no score ({source}): "
                f"{reason} (row {id_})"
            )


def word_cautions(signatures: Mapping[str, str]) -> Iterator[str]:
    """Sentences about text metrics that are not over the usual words."""
    for name, signature in signatures.items():
        if (
            "words:unicode" in signature
            or ", unicode in" in signature
            or "tok:zh" in signature
            or "tok:char" in signature
        ):
            yield f"{name} is over words of any script, so other programs' figures may differ: {signature}"


def pair_cautions(names: tuple[str, str], conditions: tuple[Mapping[str, Any], Mapping[str, Any]]) -> Iterator[str]:
    """Sentences about what answers and losses of two variants depend on, besides the weights, where it is not the same."""
    a, b = names
    one, other = conditions
    if bool(one) != bool(other):
        yield f"{b if one else a} does not say what its rows depend on, so {a} and {b} may differ in more than the model"
        return
    differences = [
        f"another {name}" if name in HASHED else f"{name} = {first}, not {second}"
        for name, first, second in differing_conditions(one, other)
        if name != "model"
    ]
    if differences:
        yield f"{a} and {b} differ in more than the model: {'; '.join(differences)}"
    votes = [side.get("answer", {}).get("consensus", {}).get("method") in ROUGE_VOTES for side in conditions]
    if votes[0] != votes[1]:
        yield f"{a if votes[0] else b} chose its answers by ROUGE-L, so its ROUGE is flattered: go by another metric"


def tokenizers_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether losses per token cannot be compared, as far as it is known."""
    return bool(one) and bool(other) and one.get("tokenizer") != other.get("tokenizer")


def tokenizer_caution(names: tuple[str, str], *, has_bytes: bool) -> str:
    """Why losses are not compared per token."""
    a, b = names
    instead = "compared in bits per byte" if has_bytes else "not compared: evaluate both again to get bits per byte"
    return f"{a} and {b} have different tokenizers, so their losses are {instead}"
