from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from corral.report import plots
from corral.report.run_record import Training
from corral.report.scores import scores_by_metric
from tests.report.conftest import aligned_metrics, card, metrics

TRAINING_PICTURES = (plots.draw_loss, plots.draw_learning_rate, plots.draw_throughput)


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return image


def test_pictures_have_one_width_and_a_light_ground() -> None:
    trainings = [Training("train-1-sft", metrics())]
    for png in (*(draw(trainings) for draw in TRAINING_PICTURES), plots.draw_scores(scores_by_metric(card()))):
        image = opened(png)
        ground = np.asarray(image.convert("RGB")).min(axis=-1) > 251
        assert image.width == 1300
        assert 0.7 < ground.mean() < 0.995


def test_the_same_figures_give_the_same_bytes_and_others_do_not() -> None:
    lines = metrics()
    first = [draw([Training("t", lines)]) for draw in TRAINING_PICTURES]
    assert [draw([Training("t", metrics())]) for draw in TRAINING_PICTURES] == first
    lines[30]["loss"] += 0.2
    loss, learning_rate, _ = (draw([Training("t", lines)]) for draw in TRAINING_PICTURES)
    assert loss != first[0]
    assert learning_rate == first[1]


def test_each_training_stage_has_a_row_of_its_own() -> None:
    one = opened(plots.draw_loss([Training("a", metrics())]))
    two = opened(plots.draw_loss([Training("a", metrics()), Training("b", metrics(7))]))
    assert two.height == 2 * one.height


def test_rewards_of_training_and_of_held_out_rows_are_drawn() -> None:
    lines = aligned_metrics()
    first = plots.draw_preferences([Training("a", lines)])
    for key in (
        *("reward_accuracy", "reward_chosen", "eval_reward_rejected"),
        *("logprob_chosen", "eval_logprob_rejected", "basic_prompts_passed"),
    ):
        changed = [{**line, key: line[key] - 0.4} if key in line else line for line in lines]
        assert plots.draw_preferences([Training("a", changed)]) != first, key
    assert opened(plots.draw_preferences([Training("a", lines)] * 2)).height == 2 * opened(first).height


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_training_that_has_hardly_begun_is_drawn(steps: int) -> None:
    for draw in TRAINING_PICTURES:
        opened(draw([Training("t", metrics(steps))]))


def test_names_are_never_read_as_formulas() -> None:
    formula = r"$\frac{1$"
    text = card().to_json().replace('"tuned"', '"$\\\\frac{1$"')
    opened(plots.draw_scores(scores_by_metric(type(card()).from_json(text))))
    opened(plots.draw_loss([Training(formula, metrics()), Training("$^$", metrics())]))


def test_a_scorecard_is_drawn_for_variants_that_were_not_compared() -> None:
    opened(plots.draw_scores(scores_by_metric(card().model_copy(update={"comparisons": []}))))


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant() -> None:
    assert plots.smoothed([3.0] * 9, 5) == pytest.approx([3.0] * 9)
    values = plots.smoothed([4.0, 1.0, 1.0, 1.0], 3)
    assert values[0] == 4.0
    # Weights 1/2, 1/4 … of the newest and those before it, made to sum to 1: (4/4 + 1/2) / (3/4).
    assert values[1] == pytest.approx(2.0)
    assert plots.smoothed([1.0, 2.0], 1) == [1.0, 2.0]
