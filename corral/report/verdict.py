"""What a record says: the scores side by side, one sentence of verdict, and which answers are worth showing.

Decides and words; it does not know how any of it is drawn. A difference counts as one when its p-value (Holm's, where it
was adjusted) is below 0.05, which is the rule of `Comparison.winner`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from corral.evaluation import scoring
from corral.evaluation.scorecard import SIGNIFICANT
from corral.metrics.rouge import Rouge
from corral.report.formatting import JOIN, count, listing, number, p_value, signed
from corral.report.run_record import JsonObject, RunRecord, as_number, as_object, as_objects, series

Outcome = Literal["better", "worse", "different", "undecided"]
Tone = Literal["better", "worse", "undecided", "pending"]

# The normal interval, for a scorecard that gives standard errors only.
_Z = 1.96


@dataclass(frozen=True, slots=True)
class Value:
    """One variant's figure on one metric, with its 95 % interval where there is one."""

    variant: str
    mean: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True, slots=True)
class Difference:
    """a − b on one metric. `p` is Holm's where it was adjusted (`adjusted`); `mde` is None where nothing tells."""

    a: str
    b: str
    difference: float
    low: float | None
    high: float | None
    p: float | None
    adjusted: bool
    mde: float | None
    n: int | None
    outcome: Outcome

    @property
    def is_same(self) -> bool:
        """Whether no row differs, so that nothing tells what difference would have shown."""
        return self.difference == 0 and self.mde is None and self.low == 0 == self.high


@dataclass(frozen=True, slots=True)
class Score:
    """One metric over all variants. `digits` after the point are worth showing."""

    metric: str
    label: str
    unit: str
    better: str | None
    digits: int
    values: Sequence[Value]
    differences: Sequence[Difference]

    def of(self, variant: str) -> Value | None:
        """A variant's figure."""
        return next((value for value in self.values if value.variant == variant), None)

    @property
    def lines(self) -> list[tuple[str, Value | None, Difference | None]]:
        """(variant, its figure, its difference from another) as lines of a table; a variant has one at least."""
        names = dict.fromkeys([*(value.variant for value in self.values), *(d.a for d in self.differences)])
        return [
            (name, self.of(name), d) for name in names for d in ([d for d in self.differences if d.a == name] or [None])
        ]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The page's first sentence, how sure it is, what else there is to say, and whether it is good news."""

    headline: str
    tone: Tone
    figures: str = ""
    details: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One held-out prompt with each variant's line of completions.jsonl, in the order of the variants."""

    title: str
    prompt: Sequence[JsonObject]
    reference: str | None
    answers: Mapping[str, JsonObject]
    scores: Mapping[str, float]


def scores(scorecard: JsonObject) -> list[Score]:
    """The scorecard by metric: those corral knows in its own order, task by task, then others by name."""
    variants = {
        name: as_object(as_object(v).get("metrics")) for name, v in as_object(scorecard.get("variants")).items()
    }
    comparisons = as_objects(scorecard.get("comparisons"))
    found = {metric for metrics in variants.values() for metric in metrics}
    found |= {str(c.get("metric")) for c in comparisons}
    made = [
        _score(metric, variants, [c for c in comparisons if c.get("metric") == metric])
        for metric in scoring.sort_metrics(found)
    ]
    return [score for score in made if score.values or score.differences]


def _score(metric: str, variants: Mapping[str, JsonObject], comparisons: Sequence[JsonObject]) -> Score:
    known = scoring.known_metric(metric)
    better = known.better if known else next((str(c["better"]) for c in comparisons if c.get("better")), None)
    values = [value for name, metrics in variants.items() if (value := _value(name, as_object(metrics.get(metric))))]
    largest = max((abs(value.mean) for value in values), default=0.0)
    return Score(
        metric=metric,
        label=known.label if known else metric,
        unit=known.unit if known else "",
        better=better,
        digits=known.digits if known else (3 if largest < 10 else 2),
        values=values,
        differences=[d for c in comparisons if (d := _difference(c, better))],
    )


def _value(variant: str, figures: JsonObject) -> Value | None:
    mean, se = as_number(figures.get("mean")), as_number(figures.get("se"))
    if mean is None:
        return None
    low, high = as_number(figures.get("low")), as_number(figures.get("high"))
    if (low is None or high is None) and se is not None:
        low, high = mean - _Z * se, mean + _Z * se
    return Value(variant, mean, low, high, _whole(figures.get("n")))


def _difference(comparison: JsonObject, better: str | None) -> Difference | None:
    difference = as_number(comparison.get("difference"))
    if difference is None:
        return None
    low, high = as_number(comparison.get("low")), as_number(comparison.get("high"))
    holm = as_number(comparison.get("p_holm"))
    p = as_number(comparison.get("p")) if holm is None else holm
    told = p < SIGNIFICANT if p is not None else low is not None and high is not None and (low > 0 or high < 0)
    outcome: Outcome = "undecided"
    if told and difference:
        outcome = "different" if better is None else "better" if (difference < 0) == (better == "lower") else "worse"
    return Difference(
        a=str(comparison.get("a")),
        b=str(comparison.get("b")),
        difference=difference,
        low=low,
        high=high,
        p=p,
        adjusted=holm is not None,
        mde=as_number(comparison.get("mde")) or None,
        n=_whole(comparison.get("n")),
        outcome=outcome,
    )


def _whole(value: Any) -> int | None:
    number = as_number(value)
    return None if number is None else int(number)


def variants(all_scores: Sequence[Score]) -> list[str]:
    """The names of all variants, in the order of the scorecard."""
    return list(dict.fromkeys(name for score in all_scores for name, _, _ in score.lines))


def verdict(record: RunRecord, all_scores: Sequence[Score]) -> Verdict:
    """What the run came to, as far as it got."""
    if record.contract.get("passed") is False:
        failed = listing(
            [str(c.get("name")) for c in as_objects(record.contract.get("checks")) if c.get("passed") is False]
        )
        broken = f" ({failed})" if failed else ""
        return Verdict(
            f"The merged model is not the model that was trained: its contract failed{broken}.",
            "worse",
            details=["It was kept, not promoted. The figures of the contract are below."],
        )
    compared = [score for score in all_scores if score.differences]
    if compared:
        return _compared(compared)
    if all_scores:
        first = all_scores[0]
        values = listing([f"{v.variant} {number(v.mean, first.digits)}" for v in first.values])
        return Verdict(f"{first.label}: {values}. Nothing was compared.", "pending")
    return _unevaluated(record)


def _compared(compared: Sequence[Score]) -> Verdict:
    first = compared[0]
    # Of several variants, the tuned model is what a run is about.
    main = next((d for d in first.differences if d.a == "tuned"), first.differences[-1])
    name = _in_sentence(first.label)
    a, b = first.of(main.a), first.of(main.b)
    if main.outcome == "undecided":
        figures = f" ({number(a.mean, first.digits)} and {number(b.mean, first.digits)})" if a and b else ""
        headline = f"The data cannot tell the {main.a} model’s {name} from the {main.b} model’s{figures}"
    else:
        verb = "fell" if main.difference < 0 else "rose"
        span = f" from {number(b.mean, first.digits)} to {number(a.mean, first.digits)}" if a and b else ""
        headline = f"The {main.a} model’s {name} {verb}{span}"
    facts = [f"difference {signed(main.difference, first.digits)}"]
    if main.low is not None and main.high is not None:
        facts.append(f"95{JOIN}% interval {signed(main.low, first.digits)} to {signed(main.high, first.digits)}")
    if main.p is not None:
        facts.append(p_value(main.p))
    on = f" on {count(main.n)} row{'s' * (main.n != 1)}" if main.n is not None else ""
    details = [_others(compared[1:], main)]
    if main.is_same and main.n:
        # As many as would all have been alike by chance once in twenty times.
        most = 1 - 0.05 ** (1 / main.n)
        details.insert(
            0, f"They came out the same in every row; of such rows at most {most:.0%} differ, at the 95{JOIN}% level."
        )
    elif main.outcome == "undecided" and main.mde is not None:
        details.insert(
            0, f"A true difference of {number(main.mde, first.digits)} would have shown with 80{JOIN}% power."
        )
    tone: Tone = main.outcome if main.outcome in ("better", "worse") else "undecided"
    return Verdict(headline, tone, f"({', '.join(facts)}){on}.", [d for d in details if d])


def _others(others: Sequence[Score], main: Difference) -> str:
    """One sentence on the other metrics of the same pair."""
    words = {"better": "better", "worse": "worse", "different": "different", "undecided": "not told apart"}
    parts: list[str] = []
    for outcome, word in words.items():
        labels = [s.label for s in others for d in s.differences if (d.a, d.b, d.outcome) == (main.a, main.b, outcome)]
        if labels:
            parts.append(f"{word} on {listing(labels)}" if outcome != "undecided" else f"{word} by {listing(labels)}")
    return f"Other metrics: {'; '.join(parts)}." if parts else ""


def _in_sentence(label: str) -> str:
    return label[0].lower() + label[1:] if label[1:2].islower() else label


def _unevaluated(record: RunRecord) -> Verdict:
    if record.trainings:
        training = record.trainings[-1]
        steps, losses = series(training.metrics, "eval_loss")
        last = int(as_number(training.metrics[-1].get("step")) or 0)
        if len(losses) > 1:
            text = f"held-out loss went from {number(losses[0])} to {number(losses[-1])} at step {int(steps[-1])}"
        else:
            _, trained = series(training.metrics, "loss")
            text = (
                f"training loss went from {number(trained[0])} to {number(trained[-1])}" if trained else "no loss yet"
            )
        return Verdict(
            f"{training.name} has reached step {last}: {text}.",
            "pending",
            details=["The model has not been evaluated yet."],
        )
    if (total := as_number(record.ledger.get("rows"))) is not None:
        return Verdict(f"{count(total)} rows are prepared; training has not begun.", "pending")
    return Verdict("This run has a recipe and nothing else yet.", "pending")


def examples(completions: Sequence[JsonObject], scorecard: JsonObject, each: int = 2) -> tuple[str, list[Example]]:
    """Prompts to show, and how they were chosen.

    With two variants whose answers can be scored: the `each` prompts where ROUGE-L rose most, the `each` around the
    median, and the `each` where it fell most (or rose least); else the first 3 × `each` prompts.
    """
    by_id: dict[str, dict[str, JsonObject]] = {}
    for line in completions:
        by_id.setdefault(str(line.get("id")), {})[str(line.get("variant"))] = line
    order = _variant_order(completions, scorecard)
    rouge = Rouge()
    everything = [_example(answers, order, rouge) for answers in by_id.values()]
    pair = order[-1:] + order[:1]
    ranked = [
        (e.scores[pair[0]] - e.scores[pair[1]], e)
        for e in everything
        if len(order) > 1 and set(pair) <= e.scores.keys()
    ]
    if not ranked:
        shown = everything[: 3 * each]
        return (f"The first {len(shown)} of {count(len(everything))} prompts, in the order of the file.", shown)
    ranked.sort(key=lambda item: -item[0])
    places = _places(len(ranked), each)
    chosen = [_titled(ranked[place], group, pair) for group, some in places.items() for place in some]
    choice = (
        f"{len(chosen)} of {count(len(ranked))} prompts, chosen by how much ROUGE-L against the reference answer changed "
        f"from {pair[1]} to {pair[0]}: where it rose most, the most typical, and where it did worst."
    )
    return choice, chosen


def _places(n: int, each: int) -> dict[str, list[int]]:
    """Ranks to show of n, none twice."""
    best = list(range(min(each, n)))
    worst = [i for i in range(max(0, n - each), n) if i not in best]
    middle = (n - each) // 2
    typical = [i for i in range(max(0, middle), min(n, middle + each)) if i not in best and i not in worst]
    return {"best": best, "typical": typical, "worst": worst}


def _titled(item: tuple[float, Example], group: str, pair: Sequence[str]) -> Example:
    difference, example = item
    word = {"best": "Best", "typical": "Typical", "worst": "Worst"}[group]
    after, before = (number(example.scores[name], 2) for name in pair)
    title = f"{word}: ROUGE-L {before} → {after} ({signed(difference, 2)})"
    return Example(title, example.prompt, example.reference, example.answers, example.scores)


def _variant_order(completions: Sequence[JsonObject], scorecard: JsonObject) -> list[str]:
    """The baseline first, the tuned model last, others as they come."""
    names = list(dict.fromkeys(str(line.get("variant")) for line in completions))
    baseline = scorecard.get("baseline", "base")
    return sorted(names, key=lambda name: (name != baseline, name == "tuned"))


def _example(answers: Mapping[str, JsonObject], order: Sequence[str], rouge: Rouge) -> Example:
    lines = {name: answers[name] for name in order if name in answers}
    first = next(iter(lines.values()))
    reference = first.get("reference")
    scored: dict[str, float] = {}
    for name, line in lines.items():
        score = as_number(as_object(line.get("scores")).get("rougeL"))
        if score is None and isinstance(line.get("answer"), str) and isinstance(reference, str):
            score = rouge.score(reference, line["answer"]).rougeL
        if score is not None:
            scored[name] = score
    return Example(
        "", as_objects(first.get("prompt")), reference if isinstance(reference, str) else None, lines, scored
    )
