"""Every recipe that a newcomer copies: it validates, and its small form keeps rows of every source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corral.data.prepare import prepare
from corral.data.small_form import STARTER_MODEL, shrink_recipe
from corral.messages import Conversation, Preference, record_key
from corral.recipe import Recipe, load
from corral.template import Template
from corral.training.stage_rows import check_rows_taken
from tests.e2e.conftest import succeed
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


def test_the_general_assistant_has_its_ten_sources_its_pairs_and_settings() -> None:
    recipe = load(FOLDER / "llma-o.toml")
    assert [source.label for source in recipe.data.sources][10:] == ["hub:argilla/ultrafeedback-binarized-preferences"]
    assert all(source.rows == 10000 for source in recipe.data.sources)
    train = recipe.train[0]
    assert (recipe.data.max_length, train.batch_size, train.epochs) == (512, 32, 1)
    assert (train.optimizer.lr, train.optimizer.schedule) == (2e-4, "cosine")


def test_the_alignment_stages_have_the_settings_that_were_published() -> None:
    dpo, ulma = (load(FOLDER / f"{name}.toml").train[1] for name in ("llma-o", "harmless"))
    assert dpo.dpo is not None
    assert (dpo.objective, dpo.dpo.beta, dpo.lora.rank, dpo.lora.targets) == ("dpo", 0.01, 16, "all-linear")
    assert (dpo.optimizer.lr, dpo.optimizer.warmup_ratio, dpo.optimizer.schedule, dpo.epochs) == (
        5e-6,
        0.1,
        "cosine",
        1,
    )
    assert ulma.ulma is not None
    assert (ulma.objective, ulma.ulma.beta, ulma.ulma.c, ulma.epochs, ulma.batch_size) == ("ulma", 0.1, 0.0, 3, 64)
    assert (ulma.lora.rank, ulma.lora.alpha, ulma.lora.dropout, ulma.optimizer.lr) == (8, 32, 0.1, 1e-5)


def test_no_stage_of_the_harmless_assistant_is_trained_on_an_answer_to_a_prompt_that_is_tested_on(
    tmp_path: Path,
) -> None:
    recipe = shrink_recipe(load(FOLDER / "harmless.toml"), tmp_path / "rows")
    template = Template.load(tokenizer("smollm2"), recipe.model.template)
    (tmp_path / "prepare").mkdir()
    rows = prepare(recipe.data, template, tmp_path / "prepare", recipe.seed, cache=tmp_path / "cache", workers=1)
    check_rows_taken(rows, recipe.train)
    tested = {record_key(r.prompt) for r in rows.test.records() if isinstance(r, Preference)}
    trained = {record_key(r.split_answer()[0]) for r in rows.train.records() if isinstance(r, Conversation)}
    assert tested
    assert trained
    assert not tested & trained


def test_the_general_assistant_is_aligned_with_the_published_settings() -> None:
    stage = load(FOLDER / "llma-o.toml").train[1]
    assert stage.dpo is not None
    assert (stage.objective, stage.dpo.beta, stage.epochs) == ("dpo", 0.01, 1)
    assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout, stage.lora.targets) == (16, 16, 0.05, "all-linear")
    assert (stage.optimizer.lr, stage.optimizer.schedule, stage.optimizer.warmup_ratio) == (5e-6, "cosine", 0.1)


def test_the_harmless_assistant_is_aligned_with_the_settings_of_ulmas_authors() -> None:
    stage = load(FOLDER / "harmless.toml").train[1]
    assert stage.ulma is not None
    assert (stage.ulma.beta, stage.ulma.c, stage.epochs, stage.batch_size) == (0.1, 0, 3, 64)
    assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout, stage.lora.targets) == (
        8,
        32,
        0.1,
        ("q_proj", "v_proj"),
    )
    assert (stage.optimizer.lr, stage.optimizer.schedule) == (1e-5, "cosine")


@pytest.mark.full
@pytest.mark.parametrize("name", ["llma-o", "harmless", "quickstart-align"])
def test_the_small_form_of_a_recipe_that_aligns_runs_to_its_end(name: str, tmp_path: Path) -> None:
    done = succeed("run", FOLDER / f"{name}.toml", "--small", "--out", tmp_path / "run", "--json")
    assert set(json.loads(done.stdout)["stages"].values()) == {"done"}
    card = json.loads((tmp_path / "run" / "evaluate" / "scorecard.json").read_text("utf-8"))
    assert set(card["variants"]) == {"base", "tuned", "sft"}


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
