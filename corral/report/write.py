"""A run directory → `report/index.html` and the pictures beside it.

Reads, draws, words and writes, each in its own module; knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from corral.report import html, plots, run_record, verdict
from corral.report.formatting import count, listing, number
from corral.report.html import Picture, Png
from corral.report.plots import Look
from corral.report.run_record import Training, series
from corral.report.verdict import Score
from corral.storage import remove_tree, write_atomic


def write_report(run_dir: Path) -> Path:
    """Write a run's report; of a run that is not finished, as much as there is.

    The same run gives the same bytes: times are the run's own. What is shown of a run may be written on while it is read,
    so a report of a running stage is a snapshot.

    Returns: the page, `report/index.html`. Beside it `loss.png`, `learning-rate.png`, `throughput.png` and
    `scorecard.png`, those there is something to draw for; a picture of an earlier report without its data is removed.

    Raises:
        RunError: there is no recipe.toml, or it is damaged.
        StorageError: the disk is full, or the place cannot be written.
    """
    record = run_record.read_run(run_dir)
    scores = verdict.scores(record.scorecard)
    pictures = _pictures(record.trainings, scores)
    folder = run_dir / "report"
    for name in ("loss", "learning-rate", "throughput", "scorecard"):
        if name in pictures:
            write_atomic(folder / f"{name}.png", pictures[name].light.data)
        else:
            remove_tree(folder / f"{name}.png")
    index = folder / "index.html"
    write_atomic(index, html.render(record, scores, pictures))
    return index


def _pictures(trainings: Sequence[Training], scores: Sequence[Score]) -> dict[str, Picture]:
    pictures: dict[str, Picture] = {}
    if trainings:
        pictures["loss"] = _picture(lambda look: plots.loss(trainings, look), "wide", _loss_words(trainings))
        pictures["learning-rate"] = _picture(
            lambda look: plots.learning_rate(trainings, look), "half", "The learning rate at each optimizer step."
        )
        pictures["throughput"] = _picture(
            lambda look: plots.throughput(trainings, look), "half", "Tokens per second and peak memory at each step."
        )
    if scores:
        words = (
            "Each metric of each variant with its 95 % interval, and their differences; the figures are in the table."
        )
        pictures["scorecard"] = _picture(lambda look: plots.scorecard(scores, look), "wide", words)
    return pictures


def _picture(draw: Callable[[Look], bytes], width: Literal["wide", "half"], alt: str) -> Picture:
    def png(look: Look) -> Png:
        return Png(draw(look))

    if width == "half":
        return Picture(alt, png(Look("half")), png(Look("half", dark=True)))
    return Picture(
        alt, png(Look("wide")), png(Look("wide", dark=True)), png(Look("narrow")), png(Look("narrow", dark=True))
    )


def _loss_words(trainings: Sequence[Training]) -> str:
    parts: list[str] = []
    for training in trainings:
        _, losses = series(training.metrics, "loss")
        _, held = series(training.metrics, "eval_loss")
        words = [
            f"{name} loss from {number(values[0])} to {number(values[-1])}"
            for name, values in (("training", losses), ("held-out", held))
            if values
        ]
        parts.append(f"{training.name}: {listing(words) or 'no loss'} over {count(len(losses))} steps")
    return "; ".join(parts) + "."
