from __future__ import annotations

from pathlib import Path

import pytest

from corral.errors import RecipeError
from corral.recipe import Recipe, parse

PLAIN = """
name = "x"
[model]
base = "asset:smollm2-135m-instruct"
[[data.sources]]
path = "rows.jsonl"
[[train]]
[answer]
max_tokens = 64
temperature = 0.5
"""


def recipe(*variants: str, base: Path | None = None, more: str = "") -> Recipe:
    return parse(PLAIN + more + "".join(f"[[evaluate.variants]]\n{v}\n" for v in variants), where="test", base=base)


def test_a_variant_differs_from_answer_by_what_it_names_only() -> None:
    made = recipe('name = "shots"\nanswer = { shots = { count = 4 }, consensus = { method = "rouge-l" } }')
    settings = made.evaluate.variants[0].answer_settings(made.answer)
    assert (settings.shots.count, settings.consensus.method) == (4, "rouge-l")
    assert (settings.max_tokens, settings.temperature, settings.consensus.n) == (64, 0.5, 5)


def test_a_variant_follows_answer_also_after_the_recipe_was_written_out() -> None:
    made = recipe('name = "shots"\nanswer = { shots = { count = 4 } }')
    again = parse(made.to_toml(), where="written", overrides=["answer.max_tokens=9"])
    assert parse(made.to_toml(), where="written") == made
    settings = again.evaluate.variants[0].answer_settings(again.answer)
    assert (settings.max_tokens, settings.shots.count) == (9, 4)


def test_a_source_of_examples_is_replaced_as_a_whole_and_its_path_is_the_recipes(tmp_path: Path) -> None:
    source = '[answer.shots.source]\npath = "a.jsonl"\nrows = 3\n'
    made = recipe('name = "other"\nanswer = { shots = { source = { path = "b.jsonl" } } }', base=tmp_path, more=source)
    assert made.answer.shots.source is not None
    assert made.answer.shots.source.path == str(tmp_path / "a.jsonl")
    settings = made.evaluate.variants[0].answer_settings(made.answer)
    assert settings.shots.source is not None
    assert (settings.shots.source.path, settings.shots.source.rows) == (str(tmp_path / "b.jsonl"), None)


def test_a_variant_stands_beside_the_plain_one_of_its_model_unless_it_names_another() -> None:
    made = recipe('name = "a"', 'name = "b"\nmodel = "base"', 'name = "c"\nmodel = "gguf-q8_0"\nagainst = "a"')
    assert [v.compared_with for v in made.evaluate.variants] == ["tuned", "base", "a"]
    assert [str(v.form) if v.form else None for v in made.evaluate.variants] == [None, None, "gguf q8_0"]


@pytest.mark.parametrize(
    ("variants", "said"),
    [
        (['name = "tuned"'], "every run has a variant 'tuned'"),
        (['name = "a"', 'name = "a"'], "two variants are called 'a'"),
        (['name = "a"\nagainst = "b"'], "give one of base, tuned"),
        (['name = "a"\nagainst = "a"'], "give one of base, tuned"),
        (['name = "a"\nmodel = "gguf-int3"'], "there is no model 'gguf-int3'"),
        (['name = "a"\nmodel = "openvino-int8"\nengine = "transformers"'], 'does not read `model` = "openvino-int8"'),
        (
            ['name = "a"\nanswer = { shots = { cuont = 1 } }'],
            "variants.0.answer.shots.cuont: unknown key; did you mean 'count'",
        ),
        (['name = "a"\nanswer = { temperature = -1 }'], "evaluate.variants.0.answer.temperature"),
    ],
)
def test_what_cannot_be_is_refused_by_name(variants: list[str], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(*variants)
    assert said in str(caught.value)


def test_a_change_that_does_not_go_with_answer_is_refused_with_both() -> None:
    cosine = '[answer.consensus]\nmethod = "cosine"\n'
    with pytest.raises(
        RecipeError, match=r"`evaluate.variants.0.answer` with `\[answer\]`: `consensus.stop` = \"adaptive\""
    ):
        recipe('name = "a"\nanswer = { consensus = { stop = "adaptive" } }', more=cosine)


def test_another_way_to_vote_leaves_an_adaptive_stop_behind() -> None:
    adaptive = '[answer.consensus]\nmethod = "majority"\nstop = "adaptive"\nn = 7\n'
    found = recipe('name = "a"\nanswer = { consensus = { method = "cosine" } }', more=adaptive)
    asked = found.evaluate.variants[0].answer_settings(found.answer).consensus
    assert (asked.method, asked.stop, asked.n) == ("cosine", "lossless", 7)


def test_a_task_may_be_named_once() -> None:
    task = '[[evaluate.tasks]]\nname = "mmlu"\n'
    assert recipe(more=task).evaluate.tasks[0].rows == 200
    with pytest.raises(RecipeError, match="two tasks are called 'mmlu'"):
        recipe(more=task * 2)
