"""A scorecard as tables of text, and as tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from corral.evaluation.scorecard import SIGNIFICANT, Comparison, MetricValue, Scorecard, Variant
from corral.evaluation.scoring import Metric, describe_metric, sort_metrics
from corral.evaluation.statistics import LEVEL
from corral.formatting import format_p

ARROWS = {"lower": "↓", "higher": "↑"}
OUTCOME_MARKS = {"better": "✓", "worse": "✗", "undecided": " "}
COST_NAMES = (
    *("answers", "prompt_tokens", "answer_tokens", "seconds", "answers_per_second"),
    *("candidates", "cancelled"),
)
"""Keys of `Variant.info` that `cost_rows` shows; those of a task's answers are `TASK/NAME`."""


def table_rows(card: Scorecard) -> list[tuple[str, ...]]:
    """The scorecard as text cells: a header, then a line for each metric and variant; ↓ and ↑ say which direction is better.

    If all variants have the same counterpart, the header of the differences names it; else each difference names its own.
    """
    comparisons = {(c.a, c.metric): c for c in card.comparisons}
    counterparts = {c.b for c in card.comparisons} or {card.baseline}
    difference = f"− {next(iter(counterparts))}" if len(counterparts) == 1 else "difference"
    rows: list[tuple[str, ...]] = [("metric", "variant", "mean ± se", "rows", difference, "interval", "p")]
    for name in sort_metrics(metric for variant in card.variants.values() for metric in variant.metrics):
        metric = describe_metric(name)
        label = f"{metric.label} {ARROWS.get(metric.better or '', '')}".rstrip()
        for variant_name, variant in card.variants.items():
            if value := variant.metrics.get(name):
                comparison = comparisons.get((variant_name, name))
                cells = _comparison_cells(comparison, metric, name_counterpart=len(counterparts) > 1)
                rows.append((label, variant_name, _mean_and_error(value, metric), str(value.n), *cells))
                label = ""
    return rows


def cost_rows(variants: Mapping[str, Variant]) -> list[tuple[str, ...]]:
    """The costs of answers as text cells: a header, then a line for each set of rows and variant that has them.

    Tokens are means over the answers. If there was a vote, `saved` is the share of candidates that it did not need.
    """
    infos = {name: variant.info for name, variant in variants.items()}
    voted = any(key.rpartition("/")[2] == "candidates" for info in infos.values() for key in info)
    columns = 7 + voted
    rows: list[tuple[str, ...]] = [
        ("rows", "variant", "answers", "prompt tokens", "answer tokens", "seconds", "answers/s", "saved")[:columns]
    ]
    for task in dict.fromkeys(key.rpartition("/")[0] for info in infos.values() for key in info):
        label = task or "test rows"
        for name, info in infos.items():
            answers, prompt, answer, seconds, rate, candidates, cancelled = (
                info.get(f"{task}/{cost}" if task else cost, 0.0) for cost in COST_NAMES
            )
            if answers:
                means = (f"{answers:.0f}", f"{prompt / answers:.1f}", f"{answer / answers:.1f}")
                saved = f"{cancelled / candidates:.0%}" if candidates else ""
                rows.append((label, name, *means, f"{seconds:.1f}", f"{rate:.2f}", saved)[:columns])
                label = ""
    return rows


def render_scores(card: Scorecard) -> Table:
    """`table_rows` as a table for a terminal; it fits 80 columns if names have a usual length."""
    caption = [
        f"better ✓ or worse ✗: p below {SIGNIFICANT}, and an interval without 0",
        f"primary: {describe_metric(card.primary).label}, {LEVEL:.0%} interval; others: adjusted (Holm)",
    ]
    for pair in card.unpaired:
        for name, metrics in ((pair.a, pair.only_a), (pair.b, pair.only_b)):
            if metrics:
                labels = ", ".join(describe_metric(metric).label for metric in metrics)
                caption.append(f"{pair.a} and {pair.b}, not compared: only {name} has {labels}")
    caption += [f"! {caution}" for caution in card.cautions]
    return _render(table_rows(card), "\n".join(caption))


def render_costs(card: Scorecard) -> list[Table]:
    """`cost_rows` as a table for a terminal; none if nothing was answered."""
    rows = cost_rows(card.variants)
    caption = (
        "tokens: mean of an answer, examples and all candidates counted; saved: candidates that a vote did not need"
    )
    return [_render(rows, caption)] if len(rows) > 1 else []


def _render(rows: Sequence[tuple[str, ...]], caption: str) -> Table:
    header, *lines = rows
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0), pad_edge=False, caption=caption)
    for column, title in enumerate(header):
        table.add_column(title, justify="right" if column > 1 else "left")
    for line in lines:
        table.add_row(*line)
    return table


def _mean_and_error(value: MetricValue, metric: Metric) -> str:
    mean, digits = f"{value.mean:.{metric.digits}f}", metric.digits
    if value.se is not None:
        return f"{mean} ± {value.se:.{digits}f}"
    # No row differs: a rate has an interval all the same.
    if value.low is None or value.high is None:
        return mean
    return f"{mean} (≤ {value.high:.{digits}f})" if value.mean == value.low else f"{mean} (≥ {value.low:.{digits}f})"


def _comparison_cells(comparison: Comparison | None, metric: Metric, *, name_counterpart: bool) -> tuple[str, str, str]:
    if comparison is None:
        return "", "", ""
    digits = metric.digits
    interval = ""
    if comparison.low is not None and comparison.high is not None:
        interval = f"{comparison.low:+.{digits}f} … {comparison.high:+.{digits}f}"
    counterpart = f" vs {comparison.b}" if name_counterpart else ""
    p = f"{format_p(comparison.p_holm)} {OUTCOME_MARKS[comparison.outcome]}"
    return f"{comparison.difference:+.{digits}f}{counterpart}", interval, p
