"""Writes a run's report: `report/index.html` and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corral.formatting import count, listing, number
from corral.report import html, plots
from corral.report.html import Picture
from corral.report.run_record import Training, read_run, series
from corral.report.scores import MetricScores, scores_by_metric
from corral.storage import remove_tree, write_atomic

PICTURES = ("loss", "preferences", "learning-rate", "throughput", "scorecard")


def write_report(run_dir: Path) -> Path:
    """Write a run's report; an unfinished run gets a report of what it has.

    The same run gives the same bytes, since all times are the run's own. A running stage may write its files while they are
    read, so its report is a snapshot.

    Returns: the page, `report/index.html`. Beside it are `loss.png`, `preferences.png`, `learning-rate.png`, `throughput.png`
    and `scorecard.png`, as far as the run has their data; pictures of an earlier report whose data is gone are removed.

    Raises:
        RunError: recipe.toml is missing or damaged.
        StorageError: the disk is full, or a path cannot be written.
    """
    record = read_run(run_dir)
    scores = scores_by_metric(record.scorecard)
    pictures = _draw_pictures(record.trainings, scores)
    folder = run_dir / "report"
    for name in PICTURES:
        if name in pictures:
            write_atomic(folder / f"{name}.png", pictures[name].png)
        else:
            remove_tree(folder / f"{name}.png")
    page = folder / "index.html"
    write_atomic(page, html.render_page(record, scores, pictures))
    return page


def _draw_pictures(trainings: Sequence[Training], scores: Sequence[MetricScores]) -> dict[str, Picture]:
    pictures: dict[str, Picture] = {}
    if trainings:
        pictures["loss"] = Picture(plots.draw_loss(trainings), _describe_losses(trainings))
        if aligned := [training for training in trainings if series(training.metrics, "reward_accuracy")[1]]:
            pictures["preferences"] = Picture(plots.draw_preferences(aligned), _describe_rewards(aligned))
        text = "The learning rate at each optimizer step."
        pictures["learning-rate"] = Picture(plots.draw_learning_rate(trainings), text)
        text = "Tokens per second and peak memory at each step."
        pictures["throughput"] = Picture(plots.draw_throughput(trainings), text)
    if scores:
        text = (
            "Each metric of each variant with its 95 % interval, and their differences; the figures are in the table."
        )
        pictures["scorecard"] = Picture(plots.draw_scores(scores), text)
    return pictures


def _describe_rewards(trainings: Sequence[Training]) -> str:
    parts: list[str] = []
    for training in trainings:
        changes = [
            f"{name} from {number(values[0])} to {number(values[-1])}"
            for name, key in (("chosen", "reward_chosen"), ("rejected", "reward_rejected"))
            if (values := series(training.metrics, key)[1])
        ]
        parts.append(f"{training.name}: mean rewards {listing(changes)}")
    return "; ".join(parts) + "."


def _describe_losses(trainings: Sequence[Training]) -> str:
    parts: list[str] = []
    for training in trainings:
        _, losses = series(training.metrics, "loss")
        _, held_out = series(training.metrics, "eval_loss")
        changes = [
            f"{name} loss from {number(values[0])} to {number(values[-1])}"
            for name, values in (("training", losses), ("held-out", held_out))
            if values
        ]
        parts.append(f"{training.name}: {listing(changes) or 'no loss'} over {count(len(losses))} steps")
    return "; ".join(parts) + "."
