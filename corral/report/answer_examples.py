"""Chooses prompts whose answers are shown side by side: where the tuned model did best, typically and worst."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from corral.formatting import count, number, signed
from corral.metrics.rouge import Rouge
from corral.report.run_record import JsonObject, as_number, as_object, as_objects

_EACH = 2  # prompts shown of each group


@dataclass(frozen=True, slots=True)
class AnswerExample:
    """One test prompt with each variant's line of completions.jsonl, in the order of the variants.

    Attributes:
        scores: ROUGE-L by variant, of the answers that can be scored.
    """

    title: str
    prompt: Sequence[JsonObject]
    reference: str | None
    answers: Mapping[str, JsonObject]
    scores: Mapping[str, float]


def choose_examples(completions: Sequence[JsonObject], baseline: str = "base") -> tuple[str, list[AnswerExample]]:
    """Prompts to show, and a sentence that says how they were chosen.

    If two variants have scored answers: the two prompts where ROUGE-L rose most, the two around the median, and the two
    where it fell most (or rose least); else the first six prompts.
    """
    by_id: dict[str, dict[str, JsonObject]] = {}
    for line in completions:
        by_id.setdefault(str(line.get("id")), {})[str(line.get("variant"))] = line
    order = _variant_order(completions, baseline)
    rouge = Rouge(unicode=None)
    examples = [_build_example(answers, order, rouge) for answers in by_id.values()]
    if len(order) > 1:
        before, after = order[0], order[-1]
        ranked = [
            (example.scores[after] - example.scores[before], example)
            for example in examples
            if before in example.scores and after in example.scores
        ]
        if ranked:
            ranked.sort(key=lambda item: -item[0])
            chosen = [
                _add_title(ranked[rank][1], group, before, after)
                for group, ranks in _ranks_to_show(len(ranked)).items()
                for rank in ranks
            ]
            return (
                f"{len(chosen)} of {count(len(ranked))} prompts, chosen by how much ROUGE-L against the reference answer "
                f"changed from {before} to {after}: where it rose most, the most typical, and where it did worst.",
                chosen,
            )
    shown = examples[: 3 * _EACH]
    return f"The first {len(shown)} of {count(len(examples))} prompts, in the order of the file.", shown


def _ranks_to_show(n: int) -> dict[str, list[int]]:
    """Ranks of n, without repeats."""
    best = list(range(min(_EACH, n)))
    worst = [rank for rank in range(max(0, n - _EACH), n) if rank not in best]
    middle = max(0, (n - _EACH) // 2)
    typical = [rank for rank in range(middle, min(n, middle + _EACH)) if rank not in best and rank not in worst]
    return {"Best": best, "Typical": typical, "Worst": worst}


def _add_title(example: AnswerExample, group: str, before: str, after: str) -> AnswerExample:
    a, b = example.scores[after], example.scores[before]
    return replace(example, title=f"{group}: ROUGE-L {number(b, 2)} → {number(a, 2)} ({signed(a - b, 2)})")


def _variant_order(completions: Sequence[JsonObject], baseline: str) -> list[str]:
    """The baseline first, the tuned model last, others in between in the order of the file."""
    names = list(dict.fromkeys(str(line.get("variant")) for line in completions))
    return sorted(names, key=lambda name: (name != baseline, name == "tuned"))


def _build_example(answers: Mapping[str, JsonObject], order: Sequence[str], rouge: Rouge) -> AnswerExample:
    lines = {name: answers[name] for name in order if name in answers}
    first = next(iter(lines.values()))
    reference = first.get("reference")
    scores: dict[str, float] = {}
    for name, line in lines.items():
        score = as_number(as_object(line.get("scores")).get("rougeL"))
        if score is None and isinstance(line.get("answer"), str) and isinstance(reference, str):
            score = rouge.score(reference, line["answer"]).rougeL
        if score is not None:
            scores[name] = score
    return AnswerExample(
        "", as_objects(first.get("prompt")), reference if isinstance(reference, str) else None, lines, scores
    )
