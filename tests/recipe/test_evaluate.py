from __future__ import annotations

from pathlib import Path

import pytest

from corral.errors import RecipeError
from corral.recipe import Recipe, parse
from corral.recipe.evaluate import OWN_METRICS, TASK_METRICS

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


def test_a_variant_takes_settings_that_it_does_not_give_from_answer() -> None:
    loaded = recipe('name = "shots"\nanswer = { shots = { count = 4 }, consensus = { method = "rouge-l" } }')
    settings = loaded.evaluate.variants[0].answer_settings(loaded.answer)
    assert (settings.shots.count, settings.consensus.method) == (4, "rouge-l")
    assert (settings.max_tokens, settings.temperature, settings.consensus.n) == (64, 0.5, 5)


def test_a_variant_follows_answer_after_the_recipe_was_written_out() -> None:
    loaded = recipe('name = "shots"\nanswer = { shots = { count = 4 } }')
    again = parse(loaded.to_toml(), where="written", overrides=["answer.max_tokens=9"])
    assert parse(loaded.to_toml(), where="written") == loaded
    settings = again.evaluate.variants[0].answer_settings(again.answer)
    assert (settings.max_tokens, settings.shots.count) == (9, 4)


def test_a_variants_source_of_examples_replaces_the_whole_source_and_is_relative_to_the_recipe(tmp_path: Path) -> None:
    source = '[answer.shots.source]\npath = "a.jsonl"\nrows = 3\n'
    loaded = recipe(
        'name = "other"\nanswer = { shots = { source = { path = "b.jsonl" } } }', base=tmp_path, more=source
    )
    assert loaded.answer.shots.source is not None
    assert loaded.answer.shots.source.path == str(tmp_path / "a.jsonl")
    settings = loaded.evaluate.variants[0].answer_settings(loaded.answer)
    assert settings.shots.source is not None
    assert (settings.shots.source.path, settings.shots.source.rows) == (str(tmp_path / "b.jsonl"), None)


def test_a_variant_is_compared_with_the_built_in_one_of_its_model_unless_it_names_another() -> None:
    loaded = recipe('name = "a"', 'name = "b"\nmodel = "base"', 'name = "c"\nmodel = "gguf-q8_0"\nagainst = "a"')
    assert [v.compared_with for v in loaded.evaluate.variants] == ["tuned", "base", "a"]
    assert [str(v.form) if v.form else None for v in loaded.evaluate.variants] == [None, None, "gguf q8_0"]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (['name = "tuned"'], "every run has a variant 'tuned'"),
        (['name = "a"', 'name = "a"'], "two variants are called 'a'"),
        (['name = "a"\nagainst = "b"'], "give one of base, tuned"),
        (['name = "a"\nagainst = "a"'], "give one of base, tuned"),
        (['name = "a"\nmodel = "gguf-int3"'], "= 'gguf-int3' is no model"),
        (['name = "a"\nmodel = "openvino-int8"\nengine = "transformers"'], 'does not read `model` = "openvino-int8"'),
        (
            ['name = "a"\nanswer = { shots = { cuont = 1 } }'],
            "variants.0.answer.shots.cuont: unknown key; did you mean 'count'",
        ),
        (['name = "a"\nanswer = { temperature = -1 }'], "evaluate.variants.0.answer.temperature"),
    ],
)
def test_an_invalid_variant_is_refused_with_the_key_and_value(variants: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(*variants)
    assert message in str(caught.value)


def test_a_change_that_is_invalid_together_with_answer_is_refused_naming_both() -> None:
    cosine = '[answer.consensus]\nmethod = "cosine"\n'
    with pytest.raises(
        RecipeError, match=r"`evaluate.variants.0.answer` with `\[answer\]`: `consensus.stop` = \"adaptive\""
    ):
        recipe('name = "a"\nanswer = { consensus = { stop = "adaptive" } }', more=cosine)


def test_a_method_without_votes_resets_an_adaptive_stop() -> None:
    adaptive = '[answer.consensus]\nmethod = "majority"\nstop = "adaptive"\nn = 7\n'
    loaded = recipe('name = "a"\nanswer = { consensus = { method = "cosine" } }', more=adaptive)
    consensus = loaded.evaluate.variants[0].answer_settings(loaded.answer).consensus
    assert (consensus.method, consensus.stop, consensus.n) == ("cosine", "lossless", 7)


def test_a_task_can_be_given_only_once() -> None:
    task = '[[evaluate.tasks]]\nname = "mmlu"\n'
    assert recipe(more=task).evaluate.tasks[0].rows == 200
    with pytest.raises(RecipeError, match="two tasks are called 'mmlu'"):
        recipe(more=task * 2)


def test_the_primary_metric_is_one_that_is_measured() -> None:
    task = '[[evaluate.tasks]]\nname = "arithmetic"\n'
    assert recipe().evaluate.primary == "loss"
    assert recipe(more='[evaluate]\nprimary = "arithmetic/accuracy"\n' + task).evaluate.primary == "arithmetic/accuracy"
    with pytest.raises(
        RecipeError, match=r"'arithmetic/accuracy' is not measured: add the task 'arithmetic', or give one of"
    ):
        recipe(more='[evaluate]\nprimary = "arithmetic/accuracy"\n')
    named = '[evaluate]\nprimary = "token_f1"\nmetrics = ["rougeL", "token_f1"]\n'
    assert recipe(more=named).evaluate.metrics == ("rougeL", "token_f1")
    with pytest.raises(
        RecipeError, match=r"'token_f1' is not measured: add 'token_f1' to `metrics`, or give one of loss"
    ):
        recipe(more='[evaluate]\nprimary = "token_f1"\n')
    with pytest.raises(RecipeError, match=r"'rouge' is not measured: give one of loss, preference_accuracy"):
        recipe(more='[evaluate]\nprimary = "rouge"\n')


def test_every_metric_that_is_measured_can_be_primary() -> None:
    from corral.evaluation.question_sets import QUESTION_SETS
    from corral.evaluation.scoring import METRICS

    assert TASK_METRICS.keys() == QUESTION_SETS.keys()
    named = {*OWN_METRICS, *(metric for metrics in TASK_METRICS.values() for metric in metrics)}
    assert named == METRICS.keys() - {"bits_per_byte"}
    for name, metrics in TASK_METRICS.items():
        assert ("logprob" in metrics) == (QUESTION_SETS[name].kind == "choice")
        assert ("rouge1" in metrics) == (QUESTION_SETS[name].kind == "text")


def test_a_variant_that_votes_by_rouge_is_not_judged_by_rouge() -> None:
    vote = 'name = "vote"\nanswer = { consensus = { method = "rouge-l" } }'
    with pytest.raises(RecipeError, match="variant 'vote' chooses its answers by ROUGE-L, and would be judged by"):
        recipe(vote, more='[evaluate]\nprimary = "rougeL"\n')
    assert recipe(vote, more='[evaluate]\nprimary = "bleu"\n')
    # Both sides of each comparison vote in the same way.
    assert recipe(more='[answer.consensus]\nmethod = "rouge-l"\n[evaluate]\nprimary = "rougeL"\n')
