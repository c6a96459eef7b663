"""Small forms: made-up rows have the true columns and are kept, and nothing but model, sources and sizes differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from corral.data.formats import FORMATS
from corral.data.formats.public_datasets import PUBLIC_DATASETS
from corral.data.small_form import ROWS_PER_SOURCE, SAMPLE_ROWS, shrink_recipe
from corral.errors import RecipeError
from corral.messages import Conversation, Preference, record_key
from corral.recipe import Recipe, parse
from corral.template import Template

TOML = """
name = "r"
seed = 4
[model]
base = "hub:owner/large"
template = "instruction"
dtype = "bfloat16"
[data]
max_length = 700
overlong = "truncate"
max_loss = 0.1
[[data.sources]]
path = "{path}"
{more}
[[train]]
epochs = 3
batch_size = 64
[train.lora]
rank = 7
[train.optimizer]
lr = 0.5
[export]
gguf = ["q8_0"]
"""


def recipe(path: str, more: str = "") -> Recipe:
    return parse(TOML.format(path=path, more=more), where="test")


def test_every_public_data_set_has_sample_rows_with_its_columns() -> None:
    hub = {name: entry for name, entry in PUBLIC_DATASETS.items() if entry.hub_ids}
    assert len(hub) == 16
    for name, entry in hub.items():
        for i in range(ROWS_PER_SOURCE):
            assert set(SAMPLE_ROWS[name](i)) == set(entry.columns), name


@pytest.mark.parametrize("name", SAMPLE_ROWS)
def test_sample_rows_are_read_by_their_format_and_all_differ(name: str, tiny_tokenizer: Any) -> None:
    rows = [json.loads(json.dumps(SAMPLE_ROWS[name](i))) for i in range(ROWS_PER_SOURCE + 4)]
    records = [FORMATS[name](row) for row in rows]
    assert len({record_key(record) for record in records}) == ROWS_PER_SOURCE + 4
    template = Template.load(tiny_tokenizer, "chatml")
    for record in records:
        talk = record if isinstance(record, Conversation) else None
        if isinstance(record, Preference):
            talk = record.prompt.add("assistant", record.chosen)
        assert talk is not None
        assert any(template.encode(talk).trained)


def test_only_model_sources_and_sizes_differ(tmp_path: Path) -> None:
    whole = recipe("hub:tatsu-lab/alpaca", "rows = 500\nrepeat = 2")
    form = shrink_recipe(whole, tmp_path / "rows")
    before, after = whole.model_dump(), form.model_dump()
    assert Recipe.model_validate(form.model_dump(mode="json", exclude_none=True)) == form
    assert changed(before, after) == {
        "model.base",
        *("data.sources.0.path", "data.sources.0.format", "data.sources.0.name"),
        *("data.split.validation", "data.split.test"),
        *("train.0.epochs", "train.0.steps", "train.0.batch_size", "train.0.evaluate_every", "train.0.evaluate_rows"),
        "train.0.checkpoint_every",
        *("evaluate.loss_rows", "evaluate.answer_rows", "answer.max_tokens"),
    }
    lines = (tmp_path / "rows" / "1.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [SAMPLE_ROWS["alpaca"](i) for i in range(ROWS_PER_SOURCE)]


def changed(one: Any, other: Any, path: str = "") -> set[str]:
    if isinstance(one, dict):
        return set().union(*(changed(one[key], other[key], f"{path}.{key}") for key in one))
    if isinstance(one, list | tuple) and one and isinstance(one[0], dict):
        assert len(one) == len(other)
        return set().union(*(changed(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(one, other, strict=True))))
    return set() if one == other else {path.removeprefix(".")}


def test_a_small_form_is_the_same_each_time(tmp_path: Path) -> None:
    whole = recipe("hub:arcee-ai/The-Tome@abc")
    one, other = shrink_recipe(whole, tmp_path / "rows"), shrink_recipe(whole, tmp_path / "rows")
    assert one == other
    assert one.data.sources[0].label == "hub:arcee-ai/The-Tome@abc"


def test_a_local_source_is_only_capped(tmp_path: Path) -> None:
    form = shrink_recipe(recipe("asset:wikibooks-recipes", 'format = "wikibooks-recipes"'), tmp_path)
    source = form.data.sources[0]
    assert (source.path, source.rows) == ("asset:wikibooks-recipes", ROWS_PER_SOURCE)


def test_an_unknown_remote_source_is_refused_with_advice(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no small form") as caught:
        shrink_recipe(recipe("hub:owner/unheard-of"), tmp_path)
    assert "format" in (caught.value.hint or "")


def test_a_held_out_source_keeps_its_side_and_has_other_rows_than_those_to_train_on(tmp_path: Path) -> None:
    held_out = "".join(
        f'[[data.sources]]\npath = "hub:tatsu-lab/alpaca"\nname = "{side}"\nside = "{side}"\n'
        for side in ("validation", "test")
    )
    form = shrink_recipe(recipe("hub:tatsu-lab/alpaca", held_out), tmp_path / "rows")
    sources = form.data.sources
    assert [source.side for source in sources] == [None, "validation", "test"]
    assert (form.data.held_out("validation"), form.data.held_out("test")) == (0, 0)
    lines = [Path(source.path).read_text("utf-8").splitlines() for source in sources]
    assert [len(some) for some in lines] == [ROWS_PER_SOURCE, 2, 2]
    assert len({line for some in lines for line in some}) == ROWS_PER_SOURCE + 4


def test_a_small_model_is_not_held_to_the_losses_of_the_recipes_own(tmp_path: Path) -> None:
    toml = TOML.replace(
        "[export]", '[[train]]\nobjective = "dpo"\nquantization = "nf4"\nguards.chosen_fall = 0.3\n[export]'
    )
    stages = shrink_recipe(parse(toml.format(path="hub:tatsu-lab/alpaca", more=""), where="test"), tmp_path).train
    assert stages[0].guards is None
    assert stages[1].guards is not None
    assert (stages[1].guards.chosen_fall, stages[1].guards.quantisation_gap > 1, stages[1].guards.loss_rise > 1) == (
        *(0.3, True, True),
    )
