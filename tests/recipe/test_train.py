"""Training stages: what they start from, their seeds and their sources."""

from __future__ import annotations

import pytest

from corral.errors import RecipeError
from corral.recipe import parse

STAGES = """
name = "two"
[model]
base = "m"
[[data.sources]]
path = "a.jsonl"
[[data.sources]]
path = "t.jsonl"
side = "test"
[[train]]
name = "wide"
seed = 3
[[train]]
"""


def test_a_stage_starts_from_the_base_or_an_earlier_stage_by_its_name_or_folder() -> None:
    starts = {
        start: parse(STAGES + start, where="test").start_of(2) for start in ("", 'from = "base"', 'from = "wide"')
    }
    assert starts == {"": 1, 'from = "base"': 0, 'from = "wide"': 1}
    assert parse(STAGES + 'from = "train-1-wide"', where="test").stage_names == ("train-1-wide", "train-2-sft")
    with pytest.raises(RecipeError, match=r"is no earlier stage: give one of base, train-1-wide"):
        parse(STAGES + 'from = "later"', where="test")


def test_a_stage_has_its_own_seed_or_the_recipes() -> None:
    recipe = parse(f"seed = 7\n{STAGES}", where="test")
    assert [recipe.training_seed(n) for n in (1, 2)] == [3, 7]
    assert (recipe.split_seed, recipe.rows_seed, recipe.answers_seed) == (7, 7, 7)


def test_a_source_with_a_side_takes_the_place_of_the_share_of_the_others() -> None:
    data = parse(STAGES, where="test").data
    assert (data.held_out("test"), data.held_out("validation")) == (0, 0.05)
    assert data.has_side("test")


def test_a_stage_names_only_sources_that_there_are() -> None:
    with pytest.raises(RecipeError, match=r"names 'b.jsonl': the sources are a.jsonl, t.jsonl"):
        parse(f'{STAGES}sources = ["b.jsonl"]', where="test")
