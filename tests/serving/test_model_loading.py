"""What `corral serve` is given becomes models by name: runs as their recipes say, adapters on one base, replicas."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import shutil
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.answering.consensus import Consensus
from corral.engines.base import Sampling
from corral.errors import EngineClosedError, InputError, ModelError
from corral.export_forms import CONTRACT_FILE
from corral.messages import Conversation
from corral.model import loading
from corral.model.loading import load_model
from corral.run.promotion import MERGED_FOLDER, promote
from corral.run.stage_record import claim_stage, finish_stage
from corral.serving import model_loading
from corral.serving.model_loading import ModelOptions, follow_runs, open_served_models
from corral.serving.models import ServedModels
from tests.answering.test_settings import write_run
from tests.engines.tiny import write_adapter
from tests.serving.conftest import Serve

ASKED = Conversation.from_turns(("user", "What is two plus two?"))
ANSWER = """
temperature = 0.2
reasoning = true
[answer.shots]
count = 2
[answer.shots.source]
path = "{rows}"
[answer.consensus]
method = "majority"
n = 4
"""


@pytest.fixture(scope="module")
def two(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of the tiny model."""
    folder = tmp_path_factory.mktemp("adapters")
    return write_adapter(tiny_folder, folder / "cook", 1), write_adapter(tiny_folder, folder / "poet", 2)


def opened(*specs: object, **options: Any) -> ServedModels:
    given: Any = {"engine": "transformers"} | options
    return open_served_models(ModelOptions([str(spec) for spec in specs], **given))


def closed(models: ServedModels) -> list[str]:
    """Their names; they are not needed any longer."""
    asyncio.run(models.close())
    return [served.name for served in models.all()]


# Names


def test_a_model_has_its_own_name_unless_it_is_given_one(tiny_folder: Path) -> None:
    assert closed(opened(tiny_folder)) == [tiny_folder.name]
    assert closed(opened(tiny_folder, name="mine")) == ["mine"]
    assert closed(opened(f"a={tiny_folder}", f"b c={tiny_folder}")) == ["a", "b c"]


def test_a_folder_with_an_equals_sign_in_its_name_is_a_folder(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "rate=1e-4")
    assert closed(opened(folder)) == ["rate=1e-4"]


def test_ambiguous_model_names_are_refused_before_loading(tiny_folder: Path) -> None:
    for specs, options, part in (
        (["a=nowhere", "a=elsewhere"], {}, "'a'"),
        (["nowhere", "elsewhere"], {"name": "m"}, "--name"),
        (["all-minilm-l6-v2=nowhere"], {"embeddings": True}, "all-minilm-l6-v2"),
    ):
        with pytest.raises(InputError, match=part) as caught:
            opened(*specs, **options)
        assert "NAME=MODEL" in str(caught.value.hint)


# Runs


def test_a_run_is_served_with_the_settings_of_its_recipe(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i}."}]}
        for i in range(9)
    ]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    shutil.copytree(tiny_folder, run / "merge" / "model")
    write_run(run, ANSWER.format(rows=tmp_path / "shown.jsonl"), base=tiny_folder)
    models = opened(run, f"plain={tiny_folder}")
    mine, plain = models.all()
    assert (mine.name, plain.name) == ("mine", "plain")
    answerer = mine.answerer
    assert answerer.prompting
    assert (answerer.prompting.count, answerer.prompting.reasoning) == (2, True)
    prompt = answerer.template.tokenizer.decode(asyncio.run(answerer.encode_prompt(ASKED)).ids)
    assert prompt.count("<|im_start|>assistant") == 3, "two examples, and the answer to give"
    assert isinstance(answerer.consensus, Consensus)
    assert (answerer.consensus.method, answerer.consensus.n, answerer.sampling.max_tokens) == ("majority", 4, 33)
    assert (plain.answerer.prompting, plain.answerer.consensus) == (None, None)
    drawn = [(each.answerer.sampling.temperature, each.answerer.sampling.top_p) for each in (mine, plain)]
    assert drawn == [(0.2, 1.0), (0.7, 0.9)], "where there is no recipe, as in a conversation at the terminal"
    assert mine.fingerprint != plain.fingerprint, "other examples, another answer"
    closed(models)


# Adapters of one base


async def test_concurrent_adapters_answer_as_each_does_alone(
    two: tuple[Path, Path], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = {"base": tiny_folder, "cook": two[0], "poet": two[1]}
    work = [(f"What is {i} plus {i}?", Sampling(24, 2, 0.8, seed=i, logprobs=True)) for i in range(6)]

    async def answers(models: ServedModels, name: str) -> list[Any]:
        answerer = models.get(name).answerer
        given = [await answerer.answer(Conversation.from_turns(("user", text)), sampling) for text, sampling in work]
        scores = await answerer.engine.score(answerer.template.prompt(ASKED))
        return [*((answer.texts, answer.completions) for answer in given), scores]

    alone: list[list[Any]] = []
    for name, spec in specs.items():
        models = opened(f"{name}={spec}")
        alone.append(await answers(models, name))
        await models.close()
    loaded: list[Path] = []
    load = loading.load_model

    def counted(folder: Path, **options: Any) -> Any:
        loaded.append(folder)
        return load(folder, **options)

    monkeypatch.setattr(loading, "load_model", counted)
    models = opened(*(f"{name}={spec}" for name, spec in specs.items()))
    together = await asyncio.gather(*(answers(models, name) for name in (*specs, *reversed(specs))))
    await models.close()
    assert len(loaded) == 1, "the weights are loaded once"
    for (*own, own_scores), (*expected, expected_scores) in zip(together, [*alone, *reversed(alone)], strict=True):
        for (texts, completions), (expected_texts, expected_completions) in zip(own, expected, strict=True):
            assert texts == expected_texts
            for one, other in zip(completions, expected_completions, strict=True):
                assert (one.ids, one.finish) == (other.ids, other.finish)
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert own_scores == pytest.approx(expected_scores, abs=1e-4)
    assert len({given[0][0] for given in alone}) == 3, "they are different models"


async def test_a_busy_adapter_does_not_delay_another(two: tuple[Path, Path]) -> None:
    models = opened(f"cook={two[0]}", f"poet={two[1]}")
    busy, other = (models.get(name).answerer.engine for name in ("cook", "poet"))
    endless = [busy.submit([5], Sampling(400, 4, 1.0)) for _ in range(2)]
    waiting = [asyncio.create_task(generation.completions()) for generation in endless]
    await asyncio.sleep(0.05)
    await other.submit([5], Sampling(8)).completions()
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await models.close()


def test_adapters_are_selected_by_name_over_http_and_each_is_listed(two: tuple[Path, Path], serve: Serve) -> None:
    models = opened(f"cook={two[0]}", f"poet={two[1]}")
    client = serve(models).client
    assert [model.id for model in client.models.list()] == ["cook", "poet"]
    request: Any = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 16}
    cook, poet = (client.chat.completions.create(model=name, **request) for name in ("cook", "poet"))
    assert (cook.model, poet.model) == ("cook", "poet")
    assert cook.choices[0].message.content != poet.choices[0].message.content
    assert cook.system_fingerprint != poet.system_fingerprint
    closed(models)


def test_adapters_are_refused_by_an_engine_without_adapter_support(two: tuple[Path, Path]) -> None:
    with pytest.raises(ModelError, match="openvino"):
        opened(*two, engine="openvino")


# Runs that promote another model


def promote_model(run: Path, base: Path, number: int, *, broken: bool = False) -> None:
    """Let a run stand for another model, which differs from its base by a factor in its output layer."""
    stage = claim_stage(run, "train-1-sft", {"number": number})
    folder = shutil.copytree(base, stage.path / MERGED_FOLDER)
    model = load_model(base)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(-number)
    model.save_pretrained(folder)
    if broken:
        (folder / "model.safetensors").write_bytes(b"cut off")
    (folder / CONTRACT_FILE).touch()
    finish_stage(stage, 1.0, {})
    promote(run, stage, "a test")
    (folder / CONTRACT_FILE).unlink()  # models may be without


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_run(folder, base=tiny_folder)
    promote_model(folder, tiny_folder, 1)
    return folder


@contextlib.asynccontextmanager
async def followed(run: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[ServedModels]:
    monkeypatch.setattr(model_loading, "_FOLLOW_SECONDS", 0.05)
    options = ModelOptions([str(run)], "transformers", follow=True)
    models = open_served_models(options)
    task = asyncio.create_task(follow_runs(options, models))
    try:
        yield models
    finally:
        gc.unfreeze()
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])
        await models.close()


async def test_a_followed_run_serves_what_it_promotes_and_a_running_request_ends_with_the_model_it_has(
    run: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(400, temperature=1.0, seed=1)
    async with followed(run, monkeypatch) as models:
        before = models.get("mine")
        gc.freeze()
        weights = weakref.ref(before.opened.answerer.engine._shared.model)  # type: ignore[union-attr]
        (expected,) = await before.answerer.engine.submit([5], sampling).completions()
        with models.use(before):
            running = asyncio.create_task(before.answerer.engine.submit([5], sampling).completions())
            promote_model(run, tiny_folder, 2)
            while models.get("mine") is before:
                await asyncio.sleep(0.02)
            after = models.get("mine")
            assert await running == [expected], "it was not cut off"
            await before.answerer.engine.submit([5], Sampling(2)).completions()
        assert after.fingerprint != before.fingerprint
        assert after.promotion != before.promotion
        (other,) = await after.answerer.engine.submit([5], sampling).completions()
        assert other.ids != expected.ids
        with contextlib.suppress(EngineClosedError):
            while True:  # it is closed at some time
                await before.answerer.engine.submit([5], Sampling(2)).completions()
        del before, running
        while (
            weights() is not None
        ):  # the server froze what was there before, as it does: no cycle may hold the weights
            gc.collect()
            await asyncio.sleep(0.02)


async def test_a_promoted_model_that_cannot_be_loaded_is_logged_once_and_the_one_before_stays(
    run: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with followed(run, monkeypatch) as models:
        before = models.get("mine")
        promote_model(run, tiny_folder, 2, broken=True)
        while "cannot be loaded, and the one before stays" not in caplog.text:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert caplog.text.count("cannot be loaded") == 1
        assert models.get("mine") is before
        await before.answerer.engine.submit([5], Sampling(2)).completions()
        promote_model(run, tiny_folder, 3)
        while models.get("mine") is before:
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"follow": True}, "only a run promotes models"),
        ({"follow": True, "urls": ["http://127.0.0.1:9/v1"], "engine": None}, "--follow"),
        ({"adapters": Path("nowhere")}, "--adapters nowhere"),
        ({"aliases": ["x=other"]}, "there is no model 'other'"),
    ],
)
def test_options_that_do_not_fit_the_models_are_one_clear_error(
    options: dict[str, Any], part: str, tiny_folder: Path
) -> None:
    with pytest.raises(InputError) as caught:
        opened(tiny_folder, **options)
    assert part in str(caught.value)
    assert caught.value.hint


def test_an_alias_without_a_model_needs_one_model(tiny_folder: Path) -> None:
    assert closed(opened(f"m={tiny_folder}", aliases=["gpt-4o-mini"])) == ["m"]
    with pytest.raises(InputError, match="several models") as caught:
        opened(f"a={tiny_folder}", f"b={tiny_folder}", aliases=["gpt-4o-mini"])
    assert "gpt-4o-mini=MODEL" in str(caught.value.hint)
