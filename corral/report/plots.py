"""Training metrics and scorecards → PNG pictures. Knows nothing about runs, files or pages.

Every picture is drawn for one width and one background (`Look`), so that type stays readable on a phone and nothing
glares at night. Colours are from Okabe and Ito's set, which people with any colour vision can tell apart, and no meaning
hangs on colour alone. The same input gives the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from corral.report.formatting import shortened
from corral.report.run_record import Training, series
from corral.report.verdict import Score, variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn at 100 CSS pixels per inch, saved at twice that for sharp screens.
PIXELS_PER_INCH = 200
Width = Literal["wide", "half", "narrow"]
_INCHES: dict[Width, float] = {"wide": 8.6, "half": 4.2, "narrow": 3.5}


@dataclass(frozen=True, slots=True)
class Look:
    """What a picture is drawn for: `wide` (860 CSS pixels), `half` (420) or `narrow` (350), on light or dark ground."""

    width: Width = "wide"
    dark: bool = False

    @property
    def ground(self) -> str:
        """The background."""
        return "#16181b" if self.dark else "#ffffff"

    @property
    def ink(self) -> str:
        """Text."""
        return "#e4e2dd" if self.dark else "#22252a"

    @property
    def faint(self) -> str:
        """Axes, ticks and what matters less."""
        return "#8f949b" if self.dark else "#6b7178"

    @property
    def grid(self) -> str:
        """Lines behind the data."""
        return "#2c2f34" if self.dark else "#e9e9e6"

    @property
    def blue(self) -> str:
        """Training, and the first variant after the baseline."""
        return "#56b4e9" if self.dark else "#0072b2"

    @property
    def vermilion(self) -> str:
        """Held-out points, and what got worse."""
        return "#e8834a" if self.dark else "#d55e00"

    @property
    def green(self) -> str:
        """What got better."""
        return "#2fc496" if self.dark else "#009e73"


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential moving average with weight 2 / (span + 1), corrected for its start as Adam does (no lag from 0)."""
    keep = 1 - 2 / (span + 1)
    average, out = 0.0, list[float]()
    for count, value in enumerate(values, start=1):
        average = keep * average + (1 - keep) * value
        out.append(average / (1 - keep**count) if keep else value)
    return out


def _span(values: Sequence[float]) -> int:
    return max(5, len(values) // 8)


def curves(trainings: Sequence[Training], look: Look | None = None) -> dict[str, bytes]:
    """The three pictures of training, as PNG bytes by name: `loss`, `learning-rate`, `throughput`.

    Args:
        trainings: one row of axes each; `Training("my run", metrics)` needs no run directory.
        look: by default `wide` for the loss and `half` for the others, on light ground.
    """
    return {
        "loss": loss(trainings, look or Look("wide")),
        "learning-rate": learning_rate(trainings, look or Look("half")),
        "throughput": throughput(trainings, look or Look("half")),
    }


def loss(trainings: Sequence[Training], look: Look) -> bytes:
    """Training loss, raw and smoothed, with the held-out points; the lowest of them is ringed."""

    def draw(figure: Figure) -> None:
        for axes, training in zip(_column(figure, trainings, look), trainings, strict=True):
            _loss_axes(axes, training, look)

    return _picture(draw, look, height=(3.4 if look.width == "wide" else 2.9) * len(trainings))


def _loss_axes(axes: Axes, training: Training, look: Look) -> None:
    from matplotlib.patheffects import withStroke

    steps, values = series(training.metrics, "loss")
    held_steps, held = series(training.metrics, "eval_loss")
    span = _span(values)
    long_enough = len(values) >= 2 * span
    if values:
        thin: dict[str, Any] = (
            {"alpha": 0.55 if look.dark else 0.4, "linewidth": 0.9} if long_enough else {"linewidth": 1.6}
        )
        axes.plot(steps, values, color=look.blue, label="training, each step", **thin)
    if long_enough:
        line = smoothed(values, span)
        axes.plot(steps, line, color=look.blue, linewidth=1.8, label=f"training, smoothed over {span} steps")
    if held:
        axes.plot(
            held_steps,
            held,
            "o--",
            color=look.vermilion,
            markersize=4.5,
            linewidth=1.2,
            label="held out (validation rows)",
        )
        best = min(range(len(held)), key=held.__getitem__)
        axes.plot(held_steps[best], held[best], "o", markersize=10, markerfacecolor="none", color=look.vermilion)
        for place in sorted({0, best}):
            # Beside its neighbours on the line, not on it: the first point falls away to the right, the best lies low.
            offset, side = (
                ((8, 5), "left") if place == 0 else ((0, -15), "right" if place == len(held) - 1 else "center")
            )
            axes.annotate(
                f"{held[place]:.3f}",
                (held_steps[place], held[place]),
                xytext=offset,
                textcoords="offset points",
                color=look.vermilion,
                fontweight="bold",
                ha=side,
                path_effects=[withStroke(linewidth=3, foreground=look.ground)],
            )
    _step_axis(axes)
    objective = training.settings.get("objective", training.name.rpartition("-")[2])
    axes.set_ylabel("loss (nats per token)" if objective == "sft" else "loss")
    axes.margins(x=0.02, y=0.14)
    if values or held:
        axes.legend(loc="best")


def learning_rate(trainings: Sequence[Training], look: Look) -> bytes:
    """The learning rate at each step."""

    def draw(figure: Figure) -> None:
        for axes, training in zip(_column(figure, trainings, look), trainings, strict=True):
            axes.plot(*_after_start(training, "lr"), color=look.blue, linewidth=1.8)
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4))
            _step_axis(axes)
            axes.set_ylabel("learning rate")

    return _picture(draw, look, height=2.9 * len(trainings))


def throughput(trainings: Sequence[Training], look: Look) -> bytes:
    """Tokens per second of each step, and the most memory held so far."""

    def draw(figure: Figure) -> None:
        grid = figure.subplots(2 * len(trainings), 1, squeeze=False)[:, 0]
        for number, training in enumerate(trainings):
            speed, memory = grid[2 * number], grid[2 * number + 1]
            speed.sharex(memory)
            steps, rates = _after_start(training, "tokens_per_second")
            speed.plot(steps, rates, ".", color=look.blue, markersize=3.5)
            speed.plot(steps, smoothed(rates, _span(rates)), color=look.blue, linewidth=1.6)
            speed.set_ylabel("tokens/s")
            steps, peaks = series(training.metrics, "peak_memory_bytes")
            held = [value / 1e9 for value in peaks]
            memory.plot(steps, held, color=look.green, linewidth=1.8)
            memory.set_ylabel("peak memory (GB)")
            _step_axis(memory)
            for axes, values in ((speed, rates), (memory, held)):
                axes.set_ylim(0, 1.12 * max(values, default=0) or 1)
            memory.set_xlim(left=0)
            speed.tick_params(labelbottom=False)
            if len(trainings) > 1:
                _title(speed, shortened(training.name, 40))
        figure.align_ylabels()

    return _picture(draw, look, height=2.9 * len(trainings))


def _after_start(training: Training, key: str) -> tuple[list[float], list[float]]:
    """A column without step 0, which evaluates and does not train."""
    pairs = [(step, value) for step, value in zip(*series(training.metrics, key), strict=True) if step > 0]
    return [step for step, _ in pairs], [value for _, value in pairs]


def scorecard(scores: Sequence[Score], look: Look) -> bytes:
    """A row per metric, each on its own scale: every variant with its 95 % interval, and the differences about zero.

    A variant keeps its line, its shape and its place from left to right; on the right, colour says how it came out.
    """
    names = variants(scores)
    lines = [max(len({name for name, _, _ in score.lines}), 2) for score in scores]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(scores), 2, squeeze=False, gridspec_kw={"height_ratios": lines, "wspace": 0.12})
        for (left, right), score in zip(grid, scores, strict=True):
            rows = {name: row for row, name in enumerate(dict.fromkeys(name for name, _, _ in score.lines))}
            _values(left, score, rows, names, look)
            _differences(right, score, rows, names, look)
        marks = [figure.axes[0].plot([], [], **_mark(place, look))[0] for place in range(len(names))]
        figure.legend(marks, [shortened(name, 24) for name in names], loc="outside upper left", ncols=3)

    return _picture(draw, look, height=0.45 + 0.2 * ((len(names) - 1) // 3) + sum(0.55 + 0.17 * n for n in lines))


def _mark(place: int, look: Look, **other: Any) -> dict[str, Any]:
    """The baseline is an open grey square; each variant after it has a shape and colour of its own."""
    if place == 0:
        look_of = {
            "marker": "s",
            "color": look.faint,
            "markerfacecolor": look.ground,
            "linewidth": 1.6,
            "markersize": 6,
        }
    else:
        colours, shapes = (look.blue, look.vermilion, look.green, look.ink), "oD^v"
        at = (place - 1) % 4
        look_of = {"marker": shapes[at], "color": colours[at], "linewidth": 1.8, "markersize": 6.5}
    return {**look_of, **other}


def _values(axes: Axes, score: Score, rows: Mapping[str, int], names: Sequence[str], look: Look) -> None:
    for value in score.values:
        row, place = rows[value.variant], names.index(value.variant)
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [row, row], **_mark(place, look, marker="|"))
        axes.plot([value.mean], [row], **_mark(place, look))
    arrow = {"lower": " ↓", "higher": " ↑"}.get(score.better or "", "")
    wide = look.width == "wide"
    unit = f" ({score.unit})" if score.unit and wide else ""
    # The name of a task's metric leaves no room for it.
    hint = f"  {score.better} is better" if score.better and wide and len(score.label) <= 24 else ""
    _title(axes, shortened(score.label, 34) + unit + arrow + hint)
    _strip(axes, len(rows))


def _differences(axes: Axes, score: Score, rows: Mapping[str, int], names: Sequence[str], look: Look) -> None:
    axes.axvline(0, color=look.faint, linewidth=1, linestyle=(0, (4, 3)))
    colours = {"better": look.green, "worse": look.vermilion, "different": look.blue, "undecided": look.faint}
    for one in score.differences:
        row, place, colour = rows[one.a], names.index(one.a), colours[one.outcome]
        face = look.ground if one.outcome == "undecided" else colour
        if one.low is not None and one.high is not None:
            axes.plot([one.low, one.high], [row, row], marker="|", markersize=6.5, color=colour, linewidth=2)
        axes.plot([one.difference], [row], **_mark(place, look, color=colour, markerfacecolor=face))
    _title(axes, _difference_title(score, look))
    axes.set_visible(bool(score.differences))
    _strip(axes, len(rows))


def _difference_title(score: Score, look: Look) -> str:
    words = [{"undecided": "not told apart"}.get(d.outcome, d.outcome) for d in score.differences]
    if look.width != "wide":
        return words[0] if len(words) == 1 else "difference"
    if len(words) == 1:
        (one,) = score.differences
        return f"{shortened(one.a, 16)} − {shortened(one.b, 16)}: {words[0]}"
    against = {d.b for d in score.differences}
    return f"difference from {shortened(against.pop(), 24)}" if len(against) == 1 else "difference"


def _strip(axes: Axes, lines: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yticks([])
    axes.set_ylim(max(lines, 2) - 0.4, -0.6)
    axes.margins(x=0.1)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(4))


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize="medium", fontweight="bold")


def _column(figure: Figure, trainings: Sequence[Training], look: Look) -> list[Axes]:
    column: list[Axes] = list(figure.subplots(len(trainings), 1, squeeze=False)[:, 0])
    if len(trainings) > 1:
        for axes, training in zip(column, trainings, strict=True):
            _title(axes, shortened(training.name, 40))
    return column


def _picture(draw: Callable[[Figure], None], look: Look, *, height: float) -> bytes:
    """Draw into a figure of its own, and save it with a small palette: the page embeds every picture."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with matplotlib.rc_context(_style(look)):
        figure = Figure(figsize=(_INCHES[look.width], height), dpi=PIXELS_PER_INCH, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        canvas.draw()
        pixels = Image.fromarray(_pixels(canvas)[..., :3])
    out = io.BytesIO()
    pixels.quantize(96, dither=Image.Dither.NONE).save(out, "PNG", optimize=True, dpi=(PIXELS_PER_INCH,) * 2)
    return out.getvalue()


def _pixels(canvas: Any) -> Any:
    import numpy as np

    return np.asarray(canvas.buffer_rgba())


def _style(look: Look) -> dict[Any, Any]:
    size = 9.0 if look.width == "wide" else 8.0
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": size,
        # A dollar sign in a user's name is a dollar sign, not the start of a formula.
        "text.parse_math": False,
        "text.color": look.ink,
        "axes.labelcolor": look.faint,
        "axes.edgecolor": look.faint,
        "axes.facecolor": look.ground,
        "figure.facecolor": look.ground,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.7,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlepad": 6,
        "grid.color": look.grid,
        "grid.linewidth": 0.8,
        "xtick.color": look.faint,
        "ytick.color": look.faint,
        "xtick.labelsize": size - 0.5,
        "ytick.labelsize": size - 0.5,
        "xtick.major.size": 3,
        "ytick.major.size": 0,
        "axes.unicode_minus": True,
        "legend.frameon": False,
        "legend.fontsize": size - 0.5,
        "legend.labelcolor": look.ink,
        "lines.solid_capstyle": "round",
    }
