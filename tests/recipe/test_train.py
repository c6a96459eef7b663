"""Training stages: what they start from, their seeds and their sources."""

from __future__ import annotations

import pytest

from corral.errors import RecipeError
from corral.recipe import Optimizer, parse

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


def with_stages(*stages: list[str] | None, weights: tuple[float | None, ...] = (None,) * 3) -> str:
    sources = "".join(
        f'[[data.sources]]\npath = "{name}"\n' + (f"weight = {weight}\n" if weight else "")
        for name, weight in zip("abc", weights, strict=True)
    )
    tables = "".join("[[train]]\n" + (f"sources = {names}\n" if names else "") for names in stages)
    return f'name = "mixed"\n[model]\nbase = "m"\n{sources}{tables}'


def test_sources_that_are_trained_on_together_are_one_mixture() -> None:
    def mixtures(*stages: list[str] | None) -> tuple[tuple[str, ...], ...]:
        return parse(with_stages(*stages), where="test").mixtures

    assert mixtures(None) == mixtures(None, ["c", "a", "b"]) == (("a", "b", "c"),)
    assert mixtures(["b"], ["c", "a"]) == (("b",), ("a", "c"))


def test_a_source_that_no_stage_uses_is_refused_unless_it_is_held_out() -> None:
    with pytest.raises(RecipeError, match=r"no training stage uses the source 'b': name it in `train.sources`"):
        parse(with_stages(["a"], ["c"]), where="test")
    (held_out, _) = parse(
        f'{STAGES}sources = ["a.jsonl"]'.replace("seed = 3", 'sources = ["a.jsonl"]'), where="t"
    ).train
    assert held_out.sources == ("a.jsonl",)


def test_stages_that_share_weighted_sources_train_on_the_same_ones() -> None:
    for stages in ([["a", "b"], ["b", "a"], ["c"]], [["a"], ["b"], ["c"]], [None, None]):
        parse(with_stages(*stages, weights=(1, 2, 3)), where="test")
    parse(with_stages(["a", "b"], None), where="test")
    with pytest.raises(RecipeError, match="two training stages mix 'a' with different sources"):
        parse(with_stages(["a", "b"], None, weights=(1, 2, 3)), where="test")


@pytest.mark.parametrize("setting", ["weight = 2.0", "repeat = 2"])
def test_held_out_rows_have_neither_weight_nor_repeat(setting: str) -> None:
    with pytest.raises(RecipeError, match=r"is for rows to train on, and `side` = \"test\" holds them out: remove one"):
        parse(STAGES.replace('side = "test"', f'side = "test"\n{setting}'), where="test")


def test_weights_are_given_to_all_sources_that_are_trained_on_or_to_none() -> None:
    weighted = STAGES.replace('path = "a.jsonl"', 'path = "a.jsonl"\nweight = 2.0')
    assert parse(weighted, where="test").data.sources[0].weight == 2
    with pytest.raises(RecipeError, match=r"'a.jsonl' has a `weight` and 'c' has none"):
        parse(weighted.replace("[[train]]", '[[data.sources]]\npath = "c"\n[[train]]', 1), where="test")


@pytest.mark.parametrize("setting", ['side = "test"', "weight = 2.0", "repeat = 2"])
def test_rows_to_evaluate_on_are_used_as_they_are(setting: str) -> None:
    test = '[evaluate.test]\npath = "t.jsonl"\n'
    assert parse(STAGES + test, where="test").evaluate.test is not None
    with pytest.raises(RecipeError, match="these rows are evaluated on as they are: remove it"):
        parse(STAGES + test + setting, where="test")


def aligned(stage: str, objective: str = "dpo") -> str:
    return f'{STAGES}objective = "{objective}"\n{stage}'


def test_an_objective_has_its_section_and_no_other_has() -> None:
    plain, dpo = parse(aligned(""), where="test").train
    assert (plain.dpo, plain.kto, dpo.kto) == (None, None, None)
    assert dpo.dpo is not None
    assert (dpo.dpo.beta, dpo.dpo.sft_weight) == (0.1, 0.2)
    kto = parse(aligned("[train.kto]\nbeta = 0.3", "kto"), where="test").train[1].kto
    assert kto is not None
    assert kto.beta == 0.3
    with pytest.raises(RecipeError, match=r'`kto` is for `objective` = "kto", and that is "dpo": remove one'):
        parse(aligned("[train.kto]\nbeta = 0.3"), where="test")
    with pytest.raises(RecipeError, match=r"train.1.dpo.gamma.*unknown key; the keys here are beta"):
        parse(aligned("[train.dpo]\ngamma = 1"), where="test")


def test_the_learning_rate_and_warm_up_of_alignment_have_defaults_of_their_own_which_the_reference_states() -> None:
    sft, dpo = parse(aligned(""), where="test").train
    assert (sft.optimizer.lr, sft.optimizer.warmup_ratio) == (2e-4, None)
    assert (dpo.optimizer.lr, dpo.optimizer.warmup_ratio) == (5e-6, 0.1)
    given = parse(aligned("[train.optimizer]\nlr = 1e-4\nwarmup_steps = 3"), where="test").train[1].optimizer
    assert (given.lr, given.warmup_ratio, given.warmup_steps) == (1e-4, None, 3)
    rate, warmup = (Optimizer.model_fields[name].description or "" for name in ("lr", "warmup_ratio"))
    assert f"{dpo.optimizer.lr:g}".replace("e-0", "e-") in rate
    assert f"{dpo.optimizer.warmup_ratio:g}" in warmup


def test_a_resolved_recipe_with_alignment_reads_back_as_itself() -> None:
    recipe = parse(aligned("[train.dpo]\nbeta = 0.01"), where="test")
    assert parse(recipe.to_toml(), where="test") == recipe


def test_a_merge_by_likelihood_is_refused_where_some_rows_should_become_unlikely() -> None:
    with pytest.raises(RecipeError, match=r'`merge` = "best" chooses by the likelihood'):
        parse(aligned('quantization = "nf4"\nmerge = "best"'), where="test")


def test_a_validation_file_that_no_stage_names_is_refused() -> None:
    text = STAGES.replace('side = "test"', 'side = "validation"')
    text = text.replace('name = "wide"', 'name = "wide"\nsources = ["a.jsonl"]')
    with pytest.raises(RecipeError, match=r"no training stage uses the source 't.jsonl'"):
        parse(f'{text}sources = ["a.jsonl"]', where="test")
    assert parse(f'{text}sources = ["a.jsonl", "t.jsonl"]', where="test").mixtures == (("a.jsonl",),)
