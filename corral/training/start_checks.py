"""What must hold before the first step of a stage that aligns a model: its reference is the model that it starts from, and
that model knows its prompts as they are tokenised here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from corral.data.example_store import Example
from corral.errors import CheckpointError, CorralError, TemplateError
from corral.messages import Conversation, Feedback, Preference
from corral.model.loading import load_template
from corral.training.objectives import Objective, Scored, trained_positions
from corral.training.reference_logprobs import ReferencedExample
from corral.training.scorer import Scorer

if TYPE_CHECKING:
    from corral.template import Template

_ROWS = 8  # of each side
_TOLERANCES = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 0.02}
_INT8_TOLERANCE = 0.02


def reference_tolerance(dtype: str, quantization: str) -> float:
    """How far log-probabilities of a model may be from those that it gave before, in nats per token on average.

    Both passes have the same weights, in evaluation mode, and differ in what shares a pass only. In float32 that is rounding,
    1e-6 per token. 16 bits round each activation, and int8 quantises an outlier's column for its whole pass: an answer of a
    hundred tokens then differs by about 0.5 (bfloat16), 0.05 (float16), 0.01 (int8). NF4 has the rounding of its dtype. A
    model that was fine-tuned for a few steps only differs from its base by 0.1 per token and more.
    """
    return max(_TOLERANCES[dtype], _INT8_TOLERANCE if quantization == "int8" else 0.0)


def spread(rows: Sequence[Example], count: int) -> list[Example]:
    """Some of the rows, evenly spaced."""
    chosen = dict.fromkeys(i * len(rows) // count for i in range(count)) if len(rows) else ()
    return [rows[i] for i in chosen]


def check_reference(
    objective: Objective, sides: dict[str, Sequence[Example]], scorer: Scorer, tolerance: float, folder: Path
) -> None:
    """Check that the reference is the model as it is before the first step, so that r = 0 for every answer: on some rows, with
    dropout off. All processes must call it.

    Args:
        sides: the rows by the name of the file with their log-probabilities under the reference.
        tolerance: for |r|, in nats per token on average.
        folder: of these files.

    Raises: CheckpointError (it is another model; the message says how far off it is, and what the loss would begin with).
    """
    for name, rows in sides.items():
        examples = [e for e in spread(rows, _ROWS) if isinstance(e, ReferencedExample)]
        if not examples:
            continue
        policy = scorer.sums(examples)
        lengths = [[len(trained_positions(s)) for s in e.sequences] for e in examples]
        gaps = [
            sum(abs(a - b) for a, b in zip(now, e.reference, strict=True)) / sum(counts)
            for e, now, counts in zip(examples, policy, lengths, strict=True)
        ]
        mean = sum(gaps) / len(gaps)
        if mean <= tolerance:
            continue
        worst = max(range(len(gaps)), key=lambda i: gaps[i])
        begins, should = (_loss(objective, examples, values) for values in (policy, [e.reference for e in examples]))
        raise CheckpointError(
            "the reference is not the model that this stage starts from: its stored log-probabilities differ by "
            f"{mean:.3g} per token on average (allowed {tolerance:g}), and the loss would begin with {begins:.4f} where it "
            f"should be {should:.4f}",
            where=f"{folder / f'{name}.jsonl'}; most of all {examples[worst].source} row {examples[worst].index}: "
            f"{policy[worst][0]:.1f} by the model, {examples[worst].reference[0]:.1f} by the reference",
            hint="remove that folder: the stage then computes the log-probabilities of the model that it starts from",
        )


def _loss(objective: Objective, examples: Sequence[Example], values: Sequence[tuple[float, ...]]) -> float:
    """The objective on examples whose answers have these log-probabilities."""
    scored: list[Scored] = []
    part = slice(-objective.statistic_sequences or None)
    for example, sums in zip(examples, values, strict=True):
        assert isinstance(example, ReferencedExample)
        lengths = [len(trained_positions(s)) for s in example.sequences]
        policy = tuple(torch.full((n,), total / n) for n, total in zip(lengths, sums, strict=True))
        scored.append(Scored(example, policy[part], example.reference[part]))
    terms = objective.sums(scored, 0.0).terms
    counts = [sum(column) for column in zip(*(objective.counts(e) for e in examples), strict=True)]
    parts = zip(terms, counts, objective.weights, strict=True)
    return sum(term.item() / count * weight for term, count, weight in parts if count)


def check_prompts(template: Template, rows: Sequence[Example], start: Path, *, stage: str | None) -> str | None:
    """Compare how some prompts are tokenised here and with the template in the folder of the model that the stage starts from.

    Args:
        start: that folder.
        stage: the stage of this run that trained it; None for a base model.

    Returns: a warning if a base model has another chat template; None if it has none, or the ids are equal.

    Raises: TemplateError (a model that this run trained has another template).
    """
    try:
        own = load_template(start)
    except CorralError as error:
        if stage is None:
            return None
        raise TemplateError(
            f"the template of the model that {stage} trained cannot be used: {error.what}",
            where=str(start),
            hint=f"make that model again: --redo {stage}",
        ) from None
    for row in spread(rows, _ROWS):
        if not isinstance(row.record, Preference | Feedback):
            continue
        ids, there = template.prompt(row.record.prompt), _prompt_ids(own, row.record.prompt)
        if ids == there:
            continue
        where = f"{row.source} row {row.index}"
        if stage is None:
            return (
                f"the base model has a chat template of its own, which gives other ids ({where}): it is aligned with "
                f'{template.name} instead, which it may not know; model.template = "tokenizer" takes its own'
            )
        raise TemplateError(
            f"a prompt is not tokenised as in {stage}, which trained the model that this stage starts from: "
            f"{len(ids)} tokens here, {'none' if there is None else len(there)} there",
            where=f"{where}; {start}",
            hint=f"make that model again: --redo {stage}",
        )
    return None


def _prompt_ids(template: Template, prompt: Conversation) -> list[int] | None:
    try:
        return template.prompt(prompt)
    except TemplateError:
        return None
