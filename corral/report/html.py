"""Renders a run record as one self-contained HTML page.

The page has no script and refers to no other file or address: its content policy allows one stylesheet, by hash, and embedded
pictures. Everything that comes from the run is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from corral.data.ledger import FATES
from corral.evaluation.tables import ARROWS, OUTCOME_MARKS, cost_rows
from corral.formatting import (
    compact,
    count,
    format_bytes,
    format_duration,
    format_p,
    listing,
    moment,
    number,
    shorten,
    signed,
    unbroken,
)
from corral.report.answer_examples import choose_examples
from corral.report.plots import DOTS_PER_INCH
from corral.report.run_record import JsonObject, RunRecord, Training, as_number, as_object, as_objects, series
from corral.report.scores import OUTCOME_WORDS, MetricScores, scores_by_metric
from corral.report.verdict import give_verdict

_SIDES = {"train": "to train on", "validation": "for validation", "test": "for testing"}
_MAX_LEDGER_EXAMPLES = 5  # for each reason; the ledger has more


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG picture, and its content in words."""

    png: bytes
    alt: str

    @property
    def css_size(self) -> tuple[int, int]:
        """Width and height in CSS pixels at 100 per inch, from two big-endian words in the file's header."""
        width, height = int.from_bytes(self.png[16:20]), int.from_bytes(self.png[20:24])
        return round(width * 100 / DOTS_PER_INCH), round(height * 100 / DOTS_PER_INCH)

    @property
    def url(self) -> str:
        """The picture as part of the page."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


def render_page(record: RunRecord, scores: Sequence[MetricScores], pictures: Mapping[str, Picture]) -> str:
    """The page.

    Args:
        record: the run.
        scores: the scores of its scorecard.
        pictures: `loss`, `preferences`, `learning-rate`, `throughput` and `scorecard`, as far as there are any.
    """
    environment = _environment()
    style = _style()
    card = record.scorecard
    choice, examples = choose_examples(record.completions, card.baseline if card else "base")
    pairs = dict.fromkeys(f"{c.a} − {c.b}" for score in scores for c in score.comparisons)
    return environment.get_template("page.html.jinja").render(
        record=record,
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        verdict=give_verdict(record, scores),
        scores=scores,
        arrows=ARROWS,
        outcomes={key: f"{OUTCOME_MARKS[key]} {word}".strip() for key, word in OUTCOME_WORDS.items()},
        pairs=list(pairs),
        comparisons=[(each, scores_by_metric(each.comparison)) for each in record.trainings if each.gate],
        costs=cost_rows(card.variants if card else {}),
        signatures=card.signatures if card else {},
        cautions=card.cautions if card else [],
        pictures=pictures,
        facts=_facts(record),
        ledger=_ledger_view(record.ledger),
        choice=choice,
        examples=examples,
        answers=_answer_statistics(record.completions),
        contract=_contract_view(record.contract),
        exports=[_contract_view(form) for form in record.exports],
        stages=_stages(record.lineage),
        trainings=[(training, _flatten(training.settings)) for training in record.trainings],
        packages=as_object(record.environment.get("packages")),
        machine=_machine(record.environment),
        outputs=_outputs(record.lineage),
        model=_flatten(as_object(record.lineage.get("model"))),
        finished=max((stage["finished"] for stage in _stages(record.lineage)), default=""),
        command=shlex.join(["corral", "chat", str(record.path)]),
    )


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    """Label and text of what was trained on what, how long it took and on which machine, as far as it is known."""
    recipe = record.recipe
    several = len(record.trainings) > 1
    facts = [
        ("Model", str(as_object(recipe.get("model")).get("base", ""))),
        ("Data", _data_fact(record)),
        *(
            (training.name if several else "Training", _training_fact(training, several))
            for training in record.trainings
        ),
        ("Speed and memory", "; ".join(text for training in record.trainings if (text := _speed_fact(training)))),
        ("Answers", _answers_fact(record)),
        ("Time", _time_fact(record.lineage)),
        ("Machine", _machines_fact(record)),
        ("Seed", str(recipe.get("seed", ""))),
    ]
    return [(label, text) for label, text in facts if text]


def _data_fact(record: RunRecord) -> str:
    sources = as_objects(as_object(record.recipe.get("data")).get("sources"))
    names = listing([str(source.get("name") or source.get("path")) for source in sources])
    rows = _side_counts(record.ledger).get("train")
    return f"{count(rows)} rows to train on, from {names}" if rows and names else names


def _training_fact(training: Training, several: bool) -> str:
    settings = training.settings
    parts = [f"from {training.start or 'the base model'}"] if several else []
    parts += [str(settings["objective"])] if "objective" in settings else []
    lora = as_object(settings.get("lora"))
    if "rank" in lora:
        parts.append(f"LoRA of rank {lora['rank']}")
    steps = int(as_number(training.metrics[-1].get("step")) or 0)
    batch = as_number(settings.get("batch_size"))
    parts.append(f"{count(steps)} steps" + (f" of {count(batch)} examples" if batch else ""))
    _, tokens = series(training.metrics, "tokens")
    if tokens:
        parts.append(f"{count(tokens[-1])} tokens")
    held_out_steps, held_out = series(training.metrics, "eval_loss")
    if held_out:
        best = held_out.index(min(held_out))
        parts.append(f"lowest validation loss {number(held_out[best])} at step {int(held_out_steps[best])}")
        accuracies = dict(zip(*series(training.metrics, "eval_reward_accuracy"), strict=True))
        if (accuracy := accuracies.get(held_out_steps[best])) is not None:
            parts.append(f"held-out preference accuracy {accuracy:.0%} there")
    return ", ".join(parts)


def _speed_fact(training: Training) -> str:
    tokens, seconds, memory = (series(training.metrics, key)[1] for key in ("tokens", "seconds", "peak_memory_bytes"))
    speed = f"{count(tokens[-1] / seconds[-1])} tokens/s" if tokens and seconds and seconds[-1] > 0 else ""
    peak = f"{unbroken(format_bytes(max(memory)))} at the peak" if memory and max(memory) > 0 else ""
    return ", ".join(part for part in (speed, peak) if part)


def _answers_fact(record: RunRecord) -> str:
    parts: list[str] = []
    for name, variant in (record.scorecard.variants if record.scorecard else {}).items():
        tokens, seconds = variant.info.get("answer_tokens"), variant.info.get("seconds")
        if tokens and seconds:
            parts.append(f"{name}: {count(tokens)} tokens in {_duration(seconds)}, {count(tokens / seconds)} tokens/s")
    variants = record.scorecard.variants.values() if record.scorecard else ()
    engine = listing(sorted({str(v.conditions["engine"]) for v in variants if "engine" in v.conditions}))
    return "; ".join(parts) + (f" ({engine} engine)" if parts and engine else "")


def _time_fact(lineage: JsonObject) -> str:
    known = {stage["name"]: stage["seconds"] for stage in _stages(lineage) if stage["seconds"] is not None}
    each = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in known.items())
    return f"{_duration(sum(known.values()))} ({each})" if known else ""


def _machine_fact(environment: JsonObject) -> str:
    cores, memory = as_number(environment.get("cores")), as_number(environment.get("memory_bytes"))
    parts = [str(environment[key]) for key in ("device", "cpu") if environment.get(key)]
    parts += [f"{count(cores)} cores"] if cores else []
    parts += [f"{unbroken(format_bytes(memory))} of memory"] if memory else []
    return ", ".join(parts)


def _machines_fact(record: RunRecord) -> str:
    """The machine; if stages were run on several, each with its stages."""
    stages_by_machine: dict[str, list[str]] = {}
    for stage in as_objects(record.lineage.get("stages")):
        if machine := _machine_fact(as_object(stage.get("made_with"))):
            stages_by_machine.setdefault(machine, []).append(str(stage.get("name")))
    if len(stages_by_machine) < 2:
        return next(iter(stages_by_machine), None) or _machine_fact(record.environment)
    return "; ".join(f"{listing(names)}: {machine}" for machine, names in stages_by_machine.items())


def _duration(seconds: float) -> str:
    return unbroken(format_duration(seconds))


def _ledger_view(ledger: JsonObject) -> dict[str, Any]:
    """The ledger for the template: fates in order, sources with counts and bars, sides, and reasons."""
    sources = {name: as_object(value) for name, value in as_object(ledger.get("sources")).items()}
    present = {fate for part in (ledger, *sources.values()) for fate, n in _counts(part, "fates").items() if n}
    fates: list[str] = [*(fate for fate in FATES if fate in present), *sorted(present.difference(FATES))]
    reasons = [
        (name, reason, as_number(as_object(entry).get("count")), _example_texts(as_object(entry).get("examples")))
        for name, source in sources.items()
        for reason, entry in as_object(source.get("reasons")).items()
    ]
    return {
        "rows": as_number(ledger.get("rows")),
        "fates": fates,
        "colours": {fate: _colour_number(fate) for fate in fates},
        "sources": [
            (name, as_number(source.get("rows")), counts := _counts(source, "fates"), _bar(counts, fates))
            for name, source in sources.items()
        ],
        "total": _counts(ledger, "fates"),
        "sides": [f"{count(n)} {_SIDES.get(side, side)}" for side, n in _side_counts(ledger).items()],
        "reasons": reasons,
    }


def _counts(part: JsonObject, key: str) -> dict[str, float]:
    return {name: n for name, value in as_object(part.get(key)).items() if (n := as_number(value)) is not None}


def _side_counts(ledger: JsonObject) -> Mapping[str, float]:
    """Rows of each side, over all sources."""
    total: Counter[str] = Counter()
    for source in as_object(ledger.get("sources")).values():
        for side, n in _counts(as_object(source), "sides").items():
            total[side] += int(n)
    return total


def _bar(counts: Mapping[str, float], fates: Sequence[str]) -> list[tuple[int, float, float]]:
    """(colour, start, width) of each part in hundredths of the bar; no part is too thin to be seen."""
    total = sum(counts.values()) or 1
    widths = {fate: max(0.6, 100 * counts[fate] / total) for fate in fates if counts.get(fate)}
    scale = 100 / (sum(widths.values()) or 1)
    parts: list[tuple[int, float, float]] = []
    start = 0.0
    for fate, width in widths.items():
        parts.append((_colour_number(fate), round(start, 3), round(width * scale, 3)))
        start += width * scale
    return parts


def _colour_number(fate: str) -> int:
    known: list[str] = [*FATES]
    return known.index(fate) if fate in known else len(known)


def _example_texts(examples: Any) -> list[str]:
    shown = cast(list[Any], examples)[:_MAX_LEDGER_EXAMPLES] if isinstance(examples, list) else []
    if shown and all(isinstance(example, int) for example in shown):
        return [f"row {listing([str(example) for example in shown])}"]
    return [shorten(_as_text(example), 160) for example in shown]


def _contract_view(contract: JsonObject) -> dict[str, Any]:
    """The checks as a table; its columns are the keys that some check has a value for."""
    checks = as_objects(contract.get("checks"))
    keys = dict.fromkeys(key for check in checks for key in check if key not in ("name", "passed"))
    columns = [key for key in keys if any(check.get(key) not in (None, 0, "") for check in checks)]
    return {"passed": contract.get("passed"), "checks": checks, "columns": columns, "form": contract.get("form")}


def _stages(lineage: JsonObject) -> list[dict[str, Any]]:
    """All stages except the report: its own time would make each report of the same run a different file."""
    stages = [stage for stage in as_objects(lineage.get("stages")) if stage.get("name") != "report"]
    longest = max((as_number(stage.get("seconds")) or 0.0 for stage in stages), default=0.0) or 1.0
    return [
        {
            "name": str(stage.get("name", "")),
            "seconds": (seconds := as_number(stage.get("seconds"))),
            "share": round(100 * (seconds or 0.0) / longest, 3),
            "status": str(stage.get("status", "")),
            "finished": moment(stage["finished"]) if "finished" in stage else "",
            "fingerprint": str(stage.get("fingerprint", "")),
            "outputs": as_object(stage.get("outputs")),
        }
        for stage in stages
    ]


def _outputs(lineage: JsonObject) -> list[tuple[str, str]]:
    return [
        (f"{stage['name']}/{file}", str(digest))
        for stage in _stages(lineage)
        for file, digest in stage["outputs"].items()
    ]


def _machine(environment: JsonObject) -> list[tuple[str, str]]:
    shown = {key: value for key, value in environment.items() if key != "packages"}
    if (memory := as_number(shown.get("memory_bytes"))) is not None:
        shown["memory_bytes"] = f"{count(memory)} ({unbroken(format_bytes(memory))})"
    return _flatten(shown)


def _answer_statistics(completions: Sequence[JsonObject]) -> list[tuple[str, int, float | None, int]]:
    """(variant, answers, mean tokens, answers cut off by the token limit) of each variant."""
    by_variant: dict[str, list[JsonObject]] = {}
    for line in completions:
        by_variant.setdefault(str(line.get("variant")), []).append(line)
    statistics: list[tuple[str, int, float | None, int]] = []
    for variant, lines in by_variant.items():
        tokens = [n for line in lines if (n := as_number(line.get("tokens"))) is not None]
        cut_off = sum(line.get("finish") == "length" for line in lines)
        statistics.append((variant, len(lines), sum(tokens) / len(tokens) if tokens else None, cut_off))
    return statistics


def _flatten(value: JsonObject, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values as text, from nested objects."""
    pairs: list[tuple[str, str]] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            pairs += _flatten(as_object(inner), f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", _as_text(inner)))
    return pairs


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in cast(list[Any], value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _check_cell(value: Any) -> Markup:
    """A value of a contract's check, of any JSON type."""
    if isinstance(value, dict):
        return Markup(", ").join(Markup("{} {}").format(key, _check_cell(v)) for key, v in as_object(value).items())
    if isinstance(value, float):
        return _data(value, compact(value))
    return escape("" if value is None else _as_text(value))


def _data(value: float, text: str) -> Markup:
    """A rounded figure for people that carries the exact one for programs."""
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def _figure(value: float | None, digits: int = 3) -> Any:
    return "" if value is None else _data(value, number(value, digits))


def _signed(value: float, digits: int = 3) -> Any:
    return _data(value, signed(value, digits))


def _p(value: float) -> Any:
    return _data(value, format_p(value).replace("<", "< "))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("corral.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "check_cell": _check_cell,
        "count": count,
        "duration": _duration,
        "figure": _figure,
        "listing": listing,
        "p": _p,
        "shorten": shorten,
        "signed": _signed,
    }
    environment.filters.update(filters)
    return environment


@lru_cache(maxsize=1)
def _style() -> Markup:
    return Markup(_environment().get_template("style.css.jinja").render())
