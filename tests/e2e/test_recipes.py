"""Every recipe that a newcomer copies: it validates, and its small form keeps rows of every source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral.data.prepare import prepare
from corral.data.small_form import STARTER_MODEL, shrink_recipe
from corral.recipe import Recipe, load
from corral.template import Template
from tests.template.real import tokenizer

FOLDER = Path(__file__).parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.toml"))


def test_there_are_the_recipes_that_the_systems_need() -> None:
    assert {file.stem for file in FILES} >= {
        *("chat", "harmless", "llma-o", "policy-qa", "quickstart", "quickstart-align", "recipe-bot")
    }
    assert len(FILES) == 7, "a new recipe is tested here too: count it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_validates_and_says_what_it_is(file: Path) -> None:
    recipe = load(file)
    assert recipe.name == file.stem
    assert file.read_text("utf-8").startswith("# ")
    assert Recipe.model_validate(recipe.model_dump(mode="json", exclude_none=True)) == recipe


def test_the_general_assistant_has_its_ten_sources_and_settings() -> None:
    recipe = load(FOLDER / "llma-o.toml")
    assert len(recipe.data.sources) == 10
    assert all(source.rows == 10000 for source in recipe.data.sources)
    train = recipe.train[0]
    assert (recipe.data.max_length, train.batch_size, train.epochs) == (512, 32, 1)
    assert (train.optimizer.lr, train.optimizer.schedule) == (2e-4, "cosine")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_small_form_of_a_recipe_keeps_rows_of_every_source(file: Path, tmp_path: Path) -> None:
    recipe = shrink_recipe(load(file), tmp_path / "rows")
    assert recipe.model.base == STARTER_MODEL
    template = Template.load(tokenizer("smollm2"), recipe.model.template)
    folder = tmp_path / "prepare"
    folder.mkdir()
    prepared: Any = prepare(recipe.data, template, folder, recipe.seed, cache=tmp_path / "cache", workers=1)
    sides = [prepared.train, prepared.validation, prepared.test]
    assert all(len(side) > 0 for side in sides)
    kept = {example.source for side in sides for example in side}
    assert kept == {source.label for source in recipe.data.sources}
    for example in prepared.train[:3]:
        for sequence in example.sequences:
            last = max(i for i, is_trained in enumerate(sequence.trained) if is_trained)
            assert sequence.ids[last] in template.stop_ids
