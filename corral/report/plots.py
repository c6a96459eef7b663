"""Draws training metrics and scorecards as PNG pictures.

All pictures have the same width and a light ground of their own, and are readable at 350 to 640 CSS pixels on light and dark
pages. Colours are from Okabe and Ito's set, which people with any colour vision can tell apart, and no meaning depends on
colour alone. The same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from PIL import Image

from corral.evaluation.scorecard import Comparison, MetricValue
from corral.evaluation.tables import ARROWS
from corral.formatting import shorten
from corral.report.run_record import Training, series
from corral.report.scores import OUTCOME_WORDS, MetricScores, variant_names

# 520 CSS pixels at 100 per inch, drawn with 2.5 times as many dots, for sharp screens and for widths up to 640.
WIDTH_INCHES = 5.2
DOTS_PER_INCH = 250
GROUND = "#ffffff"
_INK, _FAINT, _GRID = "#22252a", "#5f656c", "#e9e9e6"
_BLUE, _VERMILION, _GREEN = "#0072b2", "#d55e00", "#009e73"
_FONT_POINTS = 10.5
_OUTCOME_COLOURS = {"better": _GREEN, "worse": _VERMILION, "undecided": _FAINT}


def draw_loss(trainings: Sequence[Training]) -> bytes:
    """Training loss, raw and smoothed, with the held-out points; the lowest of them is ringed."""

    def draw(figure: Figure) -> None:
        for axes, training in zip(_stacked_axes(figure, trainings), trainings, strict=True):
            _draw_loss_axes(axes, training)

    return _picture(draw, height=3.1 * len(trainings))


def _draw_loss_axes(axes: Axes, training: Training) -> None:
    steps, losses = series(training.metrics, "loss")
    held_out_steps, held_out = series(training.metrics, "eval_loss")
    span = _smoothing_span(losses)
    smooth = len(losses) >= 2 * span
    if losses:
        style: dict[str, Any] = {"alpha": 0.4, "linewidth": 0.9} if smooth else {"linewidth": 1.6}
        axes.plot(steps, losses, color=_BLUE, label="training, each step", **style)
    if smooth:
        label = f"training, smoothed over {span} steps"
        axes.plot(steps, smoothed(losses, span), color=_BLUE, linewidth=1.8, label=label)
    if held_out:
        style = {"markersize": 4.5, "linewidth": 1.2, "label": "held out (validation rows)"}
        axes.plot(held_out_steps, held_out, "o--", color=_VERMILION, **style)
        best = held_out.index(min(held_out))
        axes.plot(held_out_steps[best], held_out[best], "o", markersize=10, markerfacecolor="none", color=_VERMILION)
        for index in sorted({0, best}):
            _annotate(axes, index, held_out_steps, held_out)
    _label_steps(axes)
    objective = training.settings.get("objective", training.name.rpartition("-")[2])
    axes.set_ylabel("loss (nats per token)" if objective == "sft" else "loss")
    axes.margins(x=0.02, y=0.14)
    if losses or held_out:
        axes.legend(loc="best")


def _annotate(axes: Axes, index: int, steps: Sequence[float], values: Sequence[float]) -> None:
    """Write a value beside its point: the first to the right, above the falling line; others below."""
    first, last = index == 0, index == len(values) - 1
    axes.annotate(
        f"{values[index]:.3f}",
        (steps[index], values[index]),
        xytext=(8, 5) if first else (0, -15),
        textcoords="offset points",
        color=_VERMILION,
        fontweight="bold",
        ha="left" if first else "right" if last else "center",
        path_effects=[withStroke(linewidth=3, foreground=GROUND)],
    )


def draw_preferences(trainings: Sequence[Training]) -> bytes:
    """Share of rows whose rewards are in the right order, mean rewards of chosen and rejected answers, and their mean
    log-probabilities, in training and on held-out rows; and basic prompts answered well; for stages that have rewards."""
    asked = [bool(series(training.metrics, "basic_prompts_passed")[1]) for training in trainings]
    rows = [3 + more for more in asked]

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(sum(rows), 1, squeeze=False)[:, 0])
        for training, count in zip(trainings, rows, strict=True):
            parts, grid = grid[:count], grid[count:]
            _draw_preferences(parts, training)
            for axes in parts[:-1]:
                axes.sharex(parts[-1])
                axes.tick_params(labelbottom=False)
            if len(trainings) > 1:
                _set_title(parts[0], shorten(training.name, 40))
        figure.align_ylabels()

    return _picture(draw, height=1.8 * sum(rows))


def _draw_preferences(parts: Sequence[Axes], training: Training) -> None:
    """Fill the three or four parts of one stage's picture."""
    accuracy, rewards, logprobs, *prompts = parts
    _draw_both_sides(accuracy, training, "reward_accuracy", _BLUE, "rewards in the right order")
    accuracy.set_ylim(-0.03, 1.03)
    accuracy.set_ylabel("share of rows")
    for axes, key, label in ((rewards, "reward", "mean reward"), (logprobs, "logprob", "mean log-prob")):
        _draw_both_sides(axes, training, f"{key}_chosen", _GREEN, "chosen")
        _draw_both_sides(axes, training, f"{key}_rejected", _VERMILION, "rejected")
        axes.set_ylabel(label)
    for axes in prompts:
        axes.plot(*series(training.metrics, "basic_prompts_passed"), "o--", color=_BLUE, markersize=4.5, linewidth=1.0)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("basic prompts")
    for axes in parts:
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="best")
    parts[-1].margins(x=0.02)
    _label_steps(parts[-1])


def _draw_both_sides(axes: Axes, training: Training, key: str, colour: str, label: str) -> None:
    """A column of the steps as a line, and that of the held-out rows as points."""
    axes.plot(*series(training.metrics, key), color=colour, linewidth=1.6, label=label)
    axes.plot(*series(training.metrics, f"eval_{key}"), "o--", color=colour, markersize=4.5, linewidth=1.0)


def draw_learning_rate(trainings: Sequence[Training]) -> bytes:
    """The learning rate at each step."""

    def draw(figure: Figure) -> None:
        for axes, training in zip(_stacked_axes(figure, trainings), trainings, strict=True):
            axes.plot(*_without_step_0(training, "lr"), color=_BLUE, linewidth=1.8)
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
            _label_steps(axes)
            axes.set_ylabel("learning rate")

    return _picture(draw, height=3.1 * len(trainings))


def draw_throughput(trainings: Sequence[Training]) -> bytes:
    """Tokens per second of each step, and the peak memory so far."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2 * len(trainings), 1, squeeze=False)[:, 0]
        for number, training in enumerate(trainings):
            speed, memory = grid[2 * number], grid[2 * number + 1]
            speed.sharex(memory)
            steps, rates = _without_step_0(training, "tokens_per_second")
            speed.plot(steps, rates, ".", color=_BLUE, markersize=3.5)
            speed.plot(steps, smoothed(rates, _smoothing_span(rates)), color=_BLUE, linewidth=1.6)
            speed.set_ylabel("tokens/s")
            steps, peaks = series(training.metrics, "peak_memory_bytes")
            gigabytes = [value / 1e9 for value in peaks]
            memory.plot(steps, gigabytes, color=_GREEN, linewidth=1.8)
            memory.set_ylabel("peak GB")
            _label_steps(memory)
            for axes, values in ((speed, rates), (memory, gigabytes)):
                axes.set_ylim(0, 1.12 * max(values, default=0) or 1)
            memory.set_xlim(left=0)
            speed.tick_params(labelbottom=False)
            if len(trainings) > 1:
                _set_title(speed, shorten(training.name, 40))
        figure.align_ylabels()

    return _picture(draw, height=3.1 * len(trainings))


def draw_scores(scores: Sequence[MetricScores]) -> bytes:
    """A row for each metric on its own scale: every variant with its 95 % interval, and the differences about zero.

    A variant keeps its line and its shape from left to right; on the right, colour shows the outcome.
    """
    names = variant_names(scores)
    line_counts = [max(len({variant for variant, _, _ in score.lines}), 2) for score in scores]

    def draw(figure: Figure) -> None:
        ratios = {"height_ratios": line_counts, "wspace": 0.12}
        grid = figure.subplots(len(scores), 2, squeeze=False, gridspec_kw=ratios)
        for (left, right), score in zip(grid, scores, strict=True):
            lines = {name: line for line, name in enumerate(dict.fromkeys(name for name, _, _ in score.lines))}
            _draw_values(left, score, lines, names)
            _draw_differences(right, score, lines, names)
        marks = [figure.axes[0].plot([], [], **_mark(index))[0] for index in range(len(names))]
        figure.legend(marks, [shorten(name, 24) for name in names], loc="outside upper left", ncols=3)

    height = 0.45 + 0.2 * ((len(names) - 1) // 3) + sum(0.6 + 0.18 * count for count in line_counts)
    return _picture(draw, height=height)


def _mark(index: int, **changes: Any) -> dict[str, Any]:
    """The style of a variant: an open grey square for the baseline, a shape and colour of its own for each other one."""
    style: dict[str, Any] = {
        "marker": "s",
        "color": _FAINT,
        "markerfacecolor": GROUND,
        "linewidth": 1.6,
        "markersize": 6,
    }
    if index:
        number = (index - 1) % 4
        colour = (_BLUE, _VERMILION, _GREEN, _INK)[number]
        style = {"marker": "oD^v"[number], "color": colour, "linewidth": 1.8, "markersize": 6.5}
    return style | changes


def _draw_values(axes: Axes, score: MetricScores, lines: Mapping[str, int], names: Sequence[str]) -> None:
    for variant, value in score.values.items():
        line, index = lines[variant], names.index(variant)
        _draw_interval(axes, value, line, **_mark(index, marker="|"))
        axes.plot([value.mean], [line], **_mark(index))
    arrow = ARROWS.get(score.metric.better or "", "")
    _set_title(axes, f"{shorten(score.metric.label, 33)} {arrow}")
    _hide_y_axis(axes, len(lines))


def _draw_differences(axes: Axes, score: MetricScores, lines: Mapping[str, int], names: Sequence[str]) -> None:
    axes.axvline(0, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    for comparison in score.comparisons:
        line, index = lines[comparison.a], names.index(comparison.a)
        colour = _OUTCOME_COLOURS[comparison.outcome]
        fill = GROUND if comparison.outcome == "undecided" else colour
        _draw_interval(axes, comparison, line, marker="|", markersize=6.5, color=colour, linewidth=2)
        axes.plot([comparison.difference], [line], **_mark(index, color=colour, markerfacecolor=fill))
    phrases = [OUTCOME_WORDS[comparison.outcome] for comparison in score.comparisons]
    _set_title(axes, phrases[0] if len(phrases) == 1 else "difference")
    axes.set_visible(bool(score.comparisons))
    _hide_y_axis(axes, len(lines))


def _draw_interval(axes: Axes, value: MetricValue | Comparison, line: int, **style: Any) -> None:
    if value.low is not None and value.high is not None:
        axes.plot([value.low, value.high], [line, line], **style)


def _hide_y_axis(axes: Axes, lines: int) -> None:
    axes.set_yticks([])
    axes.set_ylim(max(lines, 2) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with weight 2 / (span + 1), with Adam's correction of the bias at the start."""
    keep = 1 - 2 / (span + 1)
    average, averages = 0.0, list[float]()
    for count, value in enumerate(values, start=1):
        average = keep * average + (1 - keep) * value
        averages.append(average / (1 - keep**count) if keep else value)
    return averages


def _smoothing_span(values: Sequence[float]) -> int:
    return max(5, len(values) // 8)


def _without_step_0(training: Training, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a column; step 0 is left out, since it evaluates and does not train."""
    pairs = [(step, value) for step, value in zip(*series(training.metrics, key), strict=True) if step > 0]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _stacked_axes(figure: Figure, trainings: Sequence[Training]) -> list[Axes]:
    """A row of axes for each training; they have titles if there are several."""
    column: list[Axes] = list(figure.subplots(len(trainings), 1, squeeze=False)[:, 0])
    if len(trainings) > 1:
        for axes, training in zip(column, trainings, strict=True):
            _set_title(axes, shorten(training.name, 40))
    return column


def _label_steps(axes: Axes) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _set_title(axes: Axes, text: str) -> None:
    size = "small" if len(text) > 24 else "medium"  # titles of two columns stand side by side
    axes.set_title(text, loc="left", fontsize=size, fontweight="bold")


def _picture(draw: Callable[[Figure], None], *, height: float) -> bytes:
    """Draw a figure and save it with a small palette, since the page embeds every picture."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=DOTS_PER_INCH, layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    out = io.BytesIO()
    pixels.quantize(96, dither=Image.Dither.NONE).save(out, "PNG", optimize=True, dpi=(DOTS_PER_INCH,) * 2)
    return out.getvalue()


_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": _FONT_POINTS,
    # A dollar sign in a user's name is a dollar sign, not the start of a formula.
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _FAINT,
    "axes.facecolor": GROUND,
    "figure.facecolor": GROUND,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelsize": _FONT_POINTS - 0.5,
    "ytick.labelsize": _FONT_POINTS - 0.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": _FONT_POINTS - 0.5,
    "legend.labelcolor": _INK,
    "lines.solid_capstyle": "round",
}
