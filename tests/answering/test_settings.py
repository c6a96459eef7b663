"""The settings of an Answerer: the recipe's `[answer]` with the overrides of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from corral.answering.identity import AnswerIdentity
from corral.answering.settings import AnswererSettings, find_run, load_answer_settings
from corral.cli import parser
from corral.errors import RecipeError, RunError
from corral.model.device import Placement
from corral.model.loading import DType
from corral.recipe.answer import Answer, Consensus, Shots

RECIPE = """
name = "mine"
seed = 11
[model]
base = "{base}"
[[data.sources]]
path = "rows.jsonl"
[[train]]
steps = 1
[answer]
{answer}
"""


def write_run(
    folder: Path, answer: str = "", *, max_tokens: int = 33, base: str | Path = "asset:smollm2-135m-instruct"
) -> str:
    """A run whose recipe has this in `[answer]`."""
    (folder / "recipe.toml").write_text(RECIPE.format(base=base, answer=f"max_tokens = {max_tokens}\n{answer}"))
    return str(folder)


def test_a_run_has_the_settings_of_its_recipe_and_a_model_the_defaults(tmp_path: Path) -> None:
    assert load_answer_settings(write_run(tmp_path), {}) == (Answer(max_tokens=33), 11)
    assert load_answer_settings("asset:smollm2-135m-instruct", {}) == (Answer(), 0)


CHANGES: dict[str, tuple[dict[str, Any], Answer]] = {
    "how it is drawn": (
        {"max_tokens": 5, "temperature": 0.4, "top_p": 0.6},
        Answer(max_tokens=5, temperature=0.4, top_p=0.6),
    ),
    "a vote": (
        {"consensus": "rouge-l", "n": 7, "temperature": 0.4, "top_p": 0.6},
        Answer(max_tokens=33, consensus=Consensus(method="rouge-l", n=7, temperature=0.4, top_p=0.6)),
    ),
    "examples": ({"shots": 3}, Answer(max_tokens=33, shots=Shots(count=3))),
}


@pytest.mark.parametrize("case", CHANGES)
def test_the_command_line_overrides(case: str, tmp_path: Path) -> None:
    changes, expected = CHANGES[case]
    assert load_answer_settings(write_run(tmp_path), changes) == (expected, 11)
    assert load_answer_settings(write_run(tmp_path), changes | {"seed": 5}) == (expected, 5)


def test_a_vote_of_the_recipe_can_be_turned_off_or_have_another_number_of_answers(tmp_path: Path) -> None:
    mine = write_run(tmp_path, '[answer.consensus]\nmethod = "majority"\nn = 9')
    assert load_answer_settings(mine, {"n": 3})[0].consensus == Consensus(method="majority", n=3)
    answer, seed = load_answer_settings(mine, {"consensus": "none", "temperature": 0.5})
    assert (answer.temperature, answer.consensus.method) == (0.5, "none")
    assert [
        AnswererSettings(mine, a, seed).choices_per_prompt for a in (answer, load_answer_settings(mine, {})[0])
    ] == [1, 9]


def test_overriding_the_method_of_a_vote_drops_an_adaptive_stop_of_the_recipe(tmp_path: Path) -> None:
    mine = write_run(tmp_path, '[answer.consensus]\nmethod = "majority"\nstop = "adaptive"')
    assert load_answer_settings(mine, {"n": 3})[0].consensus.stop == "adaptive"
    assert load_answer_settings(mine, {"consensus": "rouge-l"})[0].consensus == Consensus(method="rouge-l")
    assert load_answer_settings(mine, {"consensus": "none"})[0].consensus.method == "none"


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "many answers and no vote": ({"n": 5}, "nothing chooses"),
    "a vote of one": ({"consensus": "rouge-l", "n": 1}, "answer.consensus.n"),
    "a vote among equals": ({"consensus": "rouge-l", "temperature": 0.0}, "answer.consensus.temperature"),
    "a temperature below 0": ({"temperature": -1.0}, "answer.temperature"),
    "more than all probability": ({"top_p": 1.5}, "1.5"),
    "fewer than no examples": ({"shots": -1}, "answer.shots.count"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_overrides_are_refused(case: str) -> None:
    changes, expected = IMPOSSIBLE[case]
    with pytest.raises(RecipeError) as refused:
        load_answer_settings("asset:smollm2-135m-instruct", changes)
    assert expected in refused.value.what
    assert refused.value.hint


def test_the_identity_follows_model_settings_and_engine_but_not_the_address_of_a_server(tiny_folder: Path) -> None:
    identity = AnswererSettings(str(tiny_folder), Answer(), 0).identity()
    assert AnswererSettings(str(tiny_folder), Answer(), 0).identity() == identity
    remote = AnswererSettings(str(tiny_folder), Answer(), 0, None, ("http://127.0.0.1:1/v1",))
    others = [
        AnswererSettings(str(tiny_folder), Answer(max_tokens=9), 0),
        AnswererSettings(str(tiny_folder), Answer(temperature=0.5), 0),
        AnswererSettings(str(tiny_folder), Answer(), 0, "transformers"),
        remote,
    ]
    assert all(other.identity() != identity for other in others)
    elsewhere = AnswererSettings(str(tiny_folder), Answer(), 0, None, ("http://127.0.0.1:2/v1",))
    assert elsewhere.identity() == remote.identity(), "a server may move"
    assert AnswererSettings(str(tiny_folder), Answer(), 1).identity().digest == identity.digest, "nothing is sampled"


def test_another_engine_or_dtype_is_another_identity_and_another_device_or_version_of_corral_is_recorded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = AnswererSettings(str(tiny_folder), Answer(), 0)

    def identity(engine: str, device: str = "cpu", dtype: DType = "float32") -> AnswerIdentity:
        def default(_: str, *, adapter: bool = False) -> str:
            return engine

        monkeypatch.setattr("corral.answering.open_model.default_engine", default)
        monkeypatch.setattr("corral.model.device.choose_device", lambda *_: Placement(device, dtype))
        return settings.identity()

    before = identity("transformers")
    assert (before.engine, before.device, before.dtype) == ("transformers", "cpu", "float32")
    assert identity("openvino").digest != before.digest, "OpenVINO was installed on the way"
    assert identity("transformers", "cuda", "bfloat16").digest != before.digest
    assert identity("transformers") == before
    on_a_gpu = identity("transformers", "cuda")
    monkeypatch.setattr("corral.__version__", "0.0.0")
    upgraded = identity("transformers")
    assert on_a_gpu.digest == upgraded.digest == before.digest
    assert (on_a_gpu.conditions()["device"], upgraded.conditions()["corral"]) == ("cuda", "0.0.0")


def test_the_identity_follows_the_rows_of_a_source_of_examples(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shown = Answer.model_validate({"shots": {"count": 2, "source": {"path": str(rows)}}})
    unused = Answer.model_validate({"shots": {"source": {"path": str(rows)}}})
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    before, without = (AnswererSettings(str(tiny_folder), answer, 0).identity() for answer in (shown, unused))
    rows.write_text('{"prompt": "a", "completion": "c"}\n')
    assert AnswererSettings(str(tiny_folder), shown, 0).identity() != before
    assert AnswererSettings(str(tiny_folder), unused, 0).identity() == without


def test_an_adapter_belongs_to_the_run_it_lies_in(tmp_path: Path) -> None:
    mine = write_run(tmp_path)
    adapter = tmp_path / "train-1-sft" / "adapter"
    adapter.mkdir(parents=True)
    assert find_run(str(adapter)) is None, "a folder of a run without an adapter"
    (adapter / "adapter_config.json").write_text("{}")
    owner = find_run(str(adapter))
    assert owner is not None
    assert (owner.path, owner.recipe.seed) == (Path(mine), 11)
    assert load_answer_settings(str(adapter), {}) == load_answer_settings(mine, {})
    alone = tmp_path.parent / f"{tmp_path.name}-adapter"
    adapter.rename(alone)
    assert load_answer_settings(str(alone), {}) == (Answer(), 0)


def test_examples_of_a_model_that_is_no_run_must_be_named(tiny_folder: Path) -> None:
    with pytest.raises(RunError):
        AnswererSettings(str(tiny_folder), Answer(shots=Shots(count=2)), 0, "transformers").open_answerer()


def test_the_command_line_accepts_every_method_of_a_vote() -> None:
    methods = get_args(Consensus.model_fields["method"].annotation)
    for method in methods:
        assert parser().parse_args(["batch", "m", "p", "--out", "o", "--consensus", method]).consensus == method
    with pytest.raises(SystemExit):
        parser().parse_args(["batch", "m", "p", "--out", "o", "--consensus", "coin"])
