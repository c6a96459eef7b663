from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from corral.report import plots, verdict
from corral.report.plots import Look
from corral.report.run_record import Training
from tests.report.conftest import card, metrics

LOOKS = [Look(width, dark) for width in ("wide", "half", "narrow") for dark in (False, True)]


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


def share_of_ground(image: Image.Image, look: Look) -> float:
    ground = tuple(int(look.ground[i : i + 2], 16) for i in (1, 3, 5))
    return float((np.abs(np.asarray(image.convert("RGB")).astype(int) - ground).max(axis=-1) < 4).mean())


def test_curves_need_no_run() -> None:
    made = plots.curves([Training("a trial", metrics())])
    assert list(made) == ["loss", "learning-rate", "throughput"]
    assert [opened(png).width for png in made.values()] == [1720, 840, 840]


@pytest.mark.parametrize("look", LOOKS, ids=str)
def test_pictures_are_drawn_on_the_ground_they_are_for(look: Look) -> None:
    trainings, scores = [Training("train-1-sft", metrics())], verdict.scores(card())
    for png in (*plots.curves(trainings, look).values(), plots.scorecard(scores, look)):
        image = opened(png)
        assert image.width == {"wide": 1720, "half": 840, "narrow": 700}[look.width]
        assert 0.7 < share_of_ground(image, look) < 0.995


def test_the_same_figures_give_the_same_bytes_and_others_do_not() -> None:
    lines = metrics()
    first = plots.curves([Training("t", lines)])
    assert plots.curves([Training("t", metrics())]) == first
    lines[30]["loss"] += 0.2
    again = plots.curves([Training("t", lines)])
    assert again["loss"] != first["loss"]
    assert again["learning-rate"] == first["learning-rate"]


def test_each_training_stage_has_a_row_of_its_own() -> None:
    one = opened(plots.loss([Training("a", metrics())], Look()))
    two = opened(plots.loss([Training("a", metrics()), Training("b", metrics(7))], Look()))
    assert two.height == 2 * one.height


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_training_that_has_hardly_begun_is_drawn(steps: int) -> None:
    for png in plots.curves([Training("t", metrics(steps))]).values():
        opened(png)


def test_names_are_never_read_as_formulas() -> None:
    value = card()
    value["variants"][r"$\frac{1$"] = value["variants"].pop("tuned")
    for comparison in value["comparisons"]:
        comparison["a"] = r"$\frac{1$"
    opened(plots.scorecard(verdict.scores(value), Look()))
    opened(plots.loss([Training(r"$\frac{1$", metrics()), Training("$^$", metrics())], Look()))


def test_a_scorecard_is_drawn_for_variants_that_were_not_compared() -> None:
    value = card()
    value["comparisons"] = []
    opened(plots.scorecard(verdict.scores(value), Look()))


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert plots.smoothed([3.0] * 9, 5) == pytest.approx([3.0] * 9)
    values = plots.smoothed([4.0, 1.0, 1.0, 1.0], 3)
    assert values[0] == 4.0
    # Weights 1/2, 1/4 … of the newest and those before it, made to sum to 1: (4/4 + 1/2) / (3/4).
    assert values[1] == pytest.approx(2.0)
    assert plots.smoothed([1.0, 2.0], 1) == [1.0, 2.0]
