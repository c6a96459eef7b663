"""A record → one self-contained HTML page.

Puts words and figures in the order a stranger reads them; the template draws them. The page holds no script and names no
other file or address: its content policy allows one stylesheet, by hash, and pictures inside the page. Everything that
came from the run is escaped. Knows nothing about how figures were drawn or where the page is kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from corral.data.ledger import FATES
from corral.evaluation.scorecard import cost_rows
from corral.report import formatting, verdict
from corral.report.run_record import JsonObject, RunRecord, Training, as_number, as_object, as_objects, series
from corral.report.verdict import Score

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

SIDES = {"train": "to train on", "validation": "for validation", "test": "for testing"}
# More examples of one reason than this are in the ledger itself.
_EXAMPLES = 5


@dataclass(frozen=True, slots=True)
class Png:
    """One rendering."""

    data: bytes

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels: two big-endian words in the file's header."""
        return int.from_bytes(self.data[16:20]), int.from_bytes(self.data[20:24])

    @property
    def url(self) -> str:
        """The picture as part of the page."""
        return "data:image/png;base64," + base64.b64encode(self.data).decode()


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure for light and dark ground, and for a phone where that takes another drawing; `alt` says it in words."""

    alt: str
    light: Png
    dark: Png
    narrow_light: Png | None = None
    narrow_dark: Png | None = None


def render(record: RunRecord, scores: Sequence[Score], pictures: Mapping[str, Picture]) -> str:
    """The page.

    Args:
        record: the run.
        scores: of its scorecard.
        pictures: of `loss`, `learning-rate`, `throughput`, `scorecard`, those there are.
    """
    environment = _environment()
    style = _style()
    choice, examples = verdict.examples(record.completions, record.scorecard)
    return environment.get_template("page.html.jinja").render(
        record=record,
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        verdict=verdict.verdict(record, scores),
        scores=scores,
        pairs=len({(d.a, d.b) for score in scores for d in score.differences}),
        comparison_name=_comparison_name(scores),
        costs=_costs(record),
        adjusted=any(d.adjusted for score in scores for d in score.differences),
        pictures=pictures,
        facts=facts(record),
        ledger=ledger(record.ledger),
        choice=choice,
        examples=examples,
        answers=_answer_figures(record.completions),
        contract=contract(record.contract),
        exports=[contract(form) for form in record.exports],
        stages=stages(record.lineage),
        trainings=[(training, _flat(training.settings)) for training in record.trainings],
        packages=as_object(record.environment.get("packages")),
        machine=_machine(record.environment),
        outputs=_outputs(record.lineage),
        model=_flat(as_object(record.lineage.get("model"))),
        signatures=_flat(as_object(record.scorecard.get("signatures"))),
        finished=_finished(record.lineage),
        command=shlex.join(["corral", "chat", str(record.path)]),
    )


def facts(record: RunRecord) -> list[tuple[str, str]]:
    """What was trained on what, how long it took and on which machine: label and text, those that are known."""
    recipe = record.recipe
    sources = [str(s.get("name") or s.get("path")) for s in as_objects(as_object(recipe.get("data")).get("sources"))]
    found = [
        ("Model", str(as_object(recipe.get("model")).get("base", ""))),
        ("Data", _data_fact(record, formatting.listing(sources))),
        *((_training_label(record, t), _training_fact(t)) for t in record.trainings),
        ("Speed and memory", "; ".join(s for t in record.trainings if (s := _speed_fact(t)))),
        ("Answers", _answers_fact(record)),
        ("Time", _time_fact(record.lineage)),
        ("Machine", _machine_fact(record.environment)),
        ("Seed", str(recipe.get("seed", ""))),
    ]
    return [(label, text) for label, text in found if text]


def _data_fact(record: RunRecord, sources: str) -> str:
    rows_in = _sides(record.ledger).get("train")
    return f"{formatting.count(rows_in)} rows to train on, from {sources}" if rows_in and sources else sources


def _training_label(record: RunRecord, training: Training) -> str:
    return "Training" if len(record.trainings) == 1 else training.name


def _training_fact(training: Training) -> str:
    settings = training.settings
    parts = [str(settings["objective"])] if "objective" in settings else []
    lora = as_object(settings.get("lora"))
    if "rank" in lora:
        parts.append(f"LoRA of rank {lora['rank']}")
    steps = int(as_number(training.metrics[-1].get("step")) or 0)
    batch = as_number(settings.get("batch_size"))
    parts.append(f"{formatting.count(steps)} steps" + (f" of {formatting.count(batch)} examples" if batch else ""))
    _, tokens = series(training.metrics, "tokens")
    if tokens:
        parts.append(f"{formatting.count(tokens[-1])} tokens")
    steps_held, held = series(training.metrics, "eval_loss")
    if held:
        best = min(range(len(held)), key=held.__getitem__)
        parts.append(f"lowest validation loss {formatting.number(held[best])} at step {int(steps_held[best])}")
    return ", ".join(parts)


def _speed_fact(training: Training) -> str:
    _, tokens = series(training.metrics, "tokens")
    _, seconds = series(training.metrics, "seconds")
    _, memory = series(training.metrics, "peak_memory_bytes")
    speed = f"{formatting.count(tokens[-1] / seconds[-1])} tokens/s" if tokens and seconds and seconds[-1] > 0 else ""
    peak = f"{formatting.size(max(memory))} at the peak" if memory and max(memory) > 0 else ""
    return ", ".join(part for part in (speed, peak) if part)


def _answers_fact(record: RunRecord) -> str:
    parts: list[str] = []
    for name, variant in as_object(record.scorecard.get("variants")).items():
        info = as_object(as_object(variant).get("info"))
        tokens, seconds = as_number(info.get("answer_tokens")), as_number(info.get("seconds"))
        if tokens and seconds:
            rate = f"{formatting.count(tokens / seconds)} tokens/s"
            parts.append(f"{name}: {formatting.count(tokens)} tokens in {formatting.duration(seconds)}, {rate}")
    engine = record.environment.get("engine")
    return "; ".join(parts) + (f" ({engine} engine)" if parts and engine else "")


def _time_fact(lineage: JsonObject) -> str:
    known = [(stage["name"], stage["seconds"]) for stage in stages(lineage) if stage["seconds"] is not None]
    if not known:
        return ""
    each = ", ".join(f"{name} {formatting.duration(seconds)}" for name, seconds in known)
    return f"{formatting.duration(sum(seconds for _, seconds in known))} ({each})"


def _machine_fact(environment: JsonObject) -> str:
    cores, memory = as_number(environment.get("cores")), as_number(environment.get("memory_bytes"))
    parts = [str(environment[key]) for key in ("device", "cpu") if environment.get(key)]
    parts += [f"{formatting.count(cores)} cores"] if cores else []
    parts += [f"{formatting.size(memory)} of memory"] if memory else []
    return ", ".join(parts)


def ledger(ledger: JsonObject) -> dict[str, Any]:
    """The ledger as the template draws it: fates in order, sources with counts and bars, sides, reasons."""
    sources = {name: as_object(value) for name, value in as_object(ledger.get("sources")).items()}
    present = {fate for source in (ledger, *sources.values()) for fate, n in _counts(source, "fates").items() if n}
    fates: list[str] = [*(f for f in FATES if f in present), *sorted(present.difference(FATES))]
    reasons = [
        (name, reason, as_number(as_object(entry).get("count")), _example_texts(as_object(entry).get("examples")))
        for name, source in sources.items()
        for reason, entry in as_object(source.get("reasons")).items()
    ]
    return {
        "rows": as_number(ledger.get("rows")),
        "fates": fates,
        "numbers": {fate: _fate_number(fate) for fate in fates},
        "sources": [
            (name, as_number(source.get("rows")), counts := _counts(source, "fates"), _bar(counts, fates))
            for name, source in sources.items()
        ],
        "total": _counts(ledger, "fates"),
        "sides": [f"{formatting.count(n)} {SIDES.get(side, side)}" for side, n in _sides(ledger).items()],
        "reasons": reasons,
    }


def _counts(source: JsonObject, key: str) -> dict[str, float]:
    return {name: n for name, value in as_object(source.get(key)).items() if (n := as_number(value)) is not None}


def _sides(ledger: JsonObject) -> dict[str, float]:
    each = [_counts(as_object(source), "sides") for source in as_object(ledger.get("sources")).values()]
    return _counts(ledger, "sides") or _sum(each)


def _sum(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(c.get(key, 0) for c in counts) for key in dict.fromkeys(k for c in counts for k in c)}


def _bar(counts: Mapping[str, float], fates: Sequence[str]) -> list[tuple[int, float, float]]:
    """(number of the colour, start, width) of each part, in hundredths of the bar; none is too thin to be seen."""
    whole = sum(counts.values()) or 1
    widths = {fate: max(0.6, 100 * counts[fate] / whole) for fate in fates if counts.get(fate)}
    scale = 100 / (sum(widths.values()) or 1)
    parts: list[tuple[int, float, float]] = []
    start = 0.0
    for fate, width in widths.items():
        parts.append((_fate_number(fate), round(start, 3), round(width * scale, 3)))
        start += width * scale
    return parts


def _fate_number(fate: str) -> int:
    known: list[str] = [*FATES]
    return known.index(fate) if fate in known else len(known)


def _example_texts(examples: Any) -> list[str]:
    listed = cast(list[Any], examples) if isinstance(examples, list) else []
    if listed and all(isinstance(example, int) for example in listed):
        return [f"row {formatting.listing([str(example) for example in listed[:_EXAMPLES]])}"]
    return [formatting.shortened(_plain(example), 160) for example in listed[:_EXAMPLES]]


def contract(contract: JsonObject) -> dict[str, Any]:
    """The checks as a table whose columns are what the checks hold."""
    checks = as_objects(contract.get("checks"))
    columns = [key for key in dict.fromkeys(k for c in checks for k in c) if key not in ("name", "passed")]
    columns = [key for key in columns if any(c.get(key) not in (None, 0, "") for c in checks)]
    return {"passed": contract.get("passed"), "checks": checks, "columns": columns, "form": contract.get("form")}


def stages(lineage: JsonObject) -> list[dict[str, Any]]:
    """Stages but the report, whose own time would make every report of one run a different file."""
    found = [stage for stage in as_objects(lineage.get("stages")) if stage.get("name") != "report"]
    longest = max((as_number(stage.get("seconds")) or 0.0 for stage in found), default=0.0) or 1.0
    return [
        {
            "name": str(stage.get("name", "")),
            "seconds": (seconds := as_number(stage.get("seconds"))),
            "share": round(100 * (seconds or 0.0) / longest, 3),
            "status": str(stage.get("status", "")),
            "started": formatting.moment(stage["started"]) if "started" in stage else "",
            "finished": formatting.moment(stage["finished"]) if "finished" in stage else "",
            "fingerprint": str(stage.get("fingerprint", "")),
        }
        for stage in found
    ]


def _finished(lineage: JsonObject) -> str:
    times = [stage["finished"] for stage in stages(lineage) if stage["finished"]]
    return max(times, default="")


def _outputs(lineage: JsonObject) -> list[tuple[str, str]]:
    found = [stage for stage in as_objects(lineage.get("stages")) if stage.get("name") != "report"]
    return [
        (f"{stage.get('name')}/{file}", str(digest))
        for stage in found
        for file, digest in as_object(stage.get("outputs")).items()
    ]


def _machine(environment: JsonObject) -> list[tuple[str, str]]:
    shown = {key: value for key, value in environment.items() if key != "packages"}
    if (memory := as_number(shown.get("memory_bytes"))) is not None:
        shown["memory_bytes"] = f"{formatting.count(memory)} ({formatting.size(memory)})"
    return _flat(shown)


def _answer_figures(completions: Sequence[JsonObject]) -> list[tuple[str, int, float | None, int]]:
    """(variant, answers, mean tokens, answers cut off by the token limit) of each variant."""
    figures: list[tuple[str, int, float | None, int]] = []
    for variant in dict.fromkeys(str(line.get("variant")) for line in completions):
        lines = [line for line in completions if str(line.get("variant")) == variant]
        tokens = [n for line in lines if (n := as_number(line.get("tokens"))) is not None]
        cut = sum(line.get("finish") == "length" for line in lines)
        figures.append((variant, len(lines), sum(tokens) / len(tokens) if tokens else None, cut))
    return figures


def _comparison_name(scores: Sequence[Score]) -> str:
    """`tuned − base`, of every pair that was compared."""
    return formatting.listing(list(dict.fromkeys(f"{d.a} − {d.b}" for score in scores for d in score.differences)))


def _costs(record: RunRecord) -> list[tuple[str, ...]]:
    """What each variant's answers cost, header first."""
    infos: dict[str, dict[str, float]] = {}
    for name, variant in as_object(record.scorecard.get("variants")).items():
        info = as_object(as_object(variant).get("info"))
        infos[name] = {key: figure for key, value in info.items() if (figure := as_number(value)) is not None}
    return cost_rows(infos)


def _flat(value: JsonObject, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and plain values of nested tables."""
    pairs: list[tuple[str, str]] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            pairs += _flat(as_object(inner), f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", inner if isinstance(inner, str) else _plain(inner)))
    return pairs


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in cast(list[Any], value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _cell(value: Any) -> Markup:
    """A value of a contract's check, whose shape is not known here."""
    from markupsafe import Markup, escape

    if isinstance(value, dict):
        parts = [Markup("{} {}").format(key, _cell(inner)) for key, inner in as_object(value).items()]
        return Markup(", ").join(parts)
    if isinstance(value, float):
        return data(value, formatting.compact(value))
    return escape("" if value is None else _plain(value))


def data(value: float, text: str) -> Markup:
    """A figure for the eye that carries the exact one for programs."""
    from markupsafe import Markup

    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def _figure(value: float | None, digits: int = 3) -> Any:
    return "" if value is None else data(value, formatting.number(value, digits))


def _signed(value: float | None, digits: int = 3) -> Any:
    return "" if value is None else data(value, formatting.signed(value, digits))


def _p(value: float | None) -> Any:
    return "" if value is None else data(value, "< 0.001" if value < 0.001 else formatting.number(value))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("corral.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "cell": _cell,
        "count": formatting.count,
        "duration": formatting.duration,
        "figure": _figure,
        "p": _p,
        "shortened": formatting.shortened,
        "signed": _signed,
    }
    environment.filters.update(filters)
    return environment


@lru_cache(maxsize=1)
def _style() -> Markup:
    from markupsafe import Markup

    return Markup(_environment().get_template("style.css.jinja").render())
