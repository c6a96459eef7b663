"""vLLM holds the engine protocol, computes what transformers computes, and adapters as their merged models.

A start takes a minute (vLLM imports itself in three processes), so tests share engines where they leave them as they were.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

import psutil
import torch

from corral.answering.open_model import open_model
from corral.engines.base import Completion, Engine, Sampling
from corral.engines.registry import load_engine, load_engines
from corral.engines.vllm import VllmEngine
from corral.errors import EngineError, ModelError, RequestError
from corral.export import contract
from tests.conftest import make_tiny_model
from tests.engines.conformance import DRAWN, GREEDY, EngineConformance, Subject, complete, long_run, wait_for
from tests.engines.test_transformers import PROMPTS
from tests.engines.tiny import generated, random_ids, scores, write_adapter

pytestmark = pytest.mark.full

DEVICE: str = import_module("vllm.platforms").current_platform.device_type
CONTEXT, VOCABULARY = 2048, 256


@cache
def model() -> Any:
    """With heads of 32: vLLM has no kernels for smaller ones."""
    return make_tiny_model(
        VOCABULARY, hidden_size=128, max_position_embeddings=CONTEXT, initializer_range=0.15, pad_token_id=None
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[VllmEngine]:
    """One engine for tests that leave it as they found it."""
    engine = VllmEngine(folder, dtype="float32", device=DEVICE)
    yield engine
    asyncio.run(engine.close())


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of that model, on every layer, that plainly changes it."""
    return write_adapter(folder, tmp_path_factory.mktemp("adapter"), std=0.2, rank=5, alpha=7)


@pytest.fixture(scope="module")
def adapted(folder: Path, adapter: Path) -> Iterator[Engine]:
    engine = load_engine("vllm", folder, dtype="float32", device=DEVICE, adapter=adapter)
    yield engine
    asyncio.run(engine.close())


class TestConformance(EngineConformance):
    @pytest.fixture
    def subject(self, request: pytest.FixtureRequest, folder: Path) -> Subject:
        name = request.node.originalname
        if "clos" in name or "several_event_loops" in name:  # these close it
            return Subject(lambda: VllmEngine(folder, dtype="float32", device=DEVICE), PROMPTS)
        engine = request.getfixturevalue("shared")
        return Subject(lambda: contextlib.nullcontext(engine), PROMPTS)


@pytest.mark.parametrize("length", [1, 16, 17, 128, 129, 700])
async def test_greedy_ids_and_their_logprobs_are_those_of_transformers_the_second_time_too(
    shared: VllmEngine, length: int
) -> None:
    prompt, sampling = random_ids(length), replace(GREEDY, n=2, max_tokens=40, logprobs=True)
    first, second = [await complete(shared, prompt, sampling) for _ in range(2)]
    expected = generated(model(), prompt, 40)
    for completion in (*first, *second):
        assert list(completion.ids) == expected
        assert completion.logprobs == pytest.approx(scores(model(), [*prompt, *expected])[length - 1 :], abs=1e-3)


async def test_a_head_that_config_json_denies_is_computed_with(folder: Path, tmp_path: Path) -> None:
    denied = Path(shutil.copytree(folder, tmp_path / "denied"))
    config = json.loads((denied / "config.json").read_text())
    (denied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    async with VllmEngine(denied, dtype="float32", device=DEVICE) as engine:
        ids = random_ids(20)
        assert await engine.score(ids) == pytest.approx(scores(model(), ids), abs=1e-3)


async def test_scores_are_those_of_transformers_up_to_the_whole_context_and_beside_draws(shared: VllmEngine) -> None:
    texts = [random_ids(length) for length in (2, 3, 300, CONTEXT)]
    drawing = [shared.submit(text[:2], replace(DRAWN, n=3, logprobs=True, max_tokens=60)) for text in texts]
    scored = await asyncio.gather(*(shared.score(text) for text in texts))
    for generation in drawing:
        assert all(len(done.logprobs or ()) == 60 for done in await generation.completions())
    for text, logprobs in zip(texts, scored, strict=True):
        assert logprobs == pytest.approx(scores(model(), text), abs=1e-3)


async def test_the_most_likely_ids_are_those_of_transformers_up_to_the_whole_context(shared: VllmEngine) -> None:
    for length in (2, 40, CONTEXT):
        ids = random_ids(length)
        with torch.no_grad():
            best = model()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).topk(5)
        scored = await shared.score_top(ids, top=5)
        assert [score.logprob for score in scored] == pytest.approx(scores(model(), ids), abs=1e-3)
        values = [value for score in scored for _, value in score.top]
        assert values == pytest.approx(best.values.flatten().tolist(), abs=1e-3)
        assert [score.top[0][0] for score in scored[:40]] == best.indices[:40, 0].tolist()


async def test_a_choice_does_not_repeat_in_the_next_seed(shared: VllmEngine) -> None:
    seven, eight = [await complete(shared, PROMPTS[2], replace(DRAWN, n=2, seed=seed)) for seed in (7, 8)]
    assert seven[1].ids != eight[0].ids


async def test_a_temperature_that_vllm_would_raise_is_refused(shared: VllmEngine) -> None:
    with pytest.raises(RequestError, match=r"0\.005"):
        shared.submit(PROMPTS[0], replace(DRAWN, temperature=0.005))


async def test_ctrl_c_reaches_its_processes_and_leaves_what_they_do_to_us(shared: VllmEngine) -> None:
    own = psutil.Process().children(recursive=True)
    assert len(own) >= 2

    deltas = aiter(shared.submit(PROMPTS[1], replace(long_run(n=2), max_tokens=300)))
    await anext(deltas)
    for process in own:
        os.kill(process.pid, signal.SIGINT)
    lengths = [0, 0]
    async for delta in deltas:
        lengths[delta.choice] += len(delta.ids)
    assert sum(lengths) >= 590
    (completion,) = await complete(shared, PROMPTS[1], GREEDY)
    assert completion.finish == "length"
    assert shared.ready


async def test_an_adapter_on_its_base_computes_as_their_merged_model(
    adapted: Engine, folder: Path, adapter: Path
) -> None:
    from corral.model import adapters, merging
    from corral.model.loading import load_model

    merged = merging.merge_adapter(adapters.load(load_model(folder), adapter))

    assert adapted.features.score or DEVICE == "cpu", "only its kernels for CPUs cannot"
    for prompt in PROMPTS:
        (completion,) = await complete(adapted, prompt, replace(GREEDY, max_tokens=40, logprobs=True))
        expected = generated(merged, prompt, 40)
        assert list(completion.ids) == expected != generated(model(), prompt, 40)
        logprobs = scores(merged, [*prompt, *expected])
        assert completion.logprobs == pytest.approx(logprobs[len(prompt) - 1 :], abs=1e-3)
        if adapted.features.score:
            assert await adapted.score([*prompt, *expected]) == pytest.approx(logprobs, abs=1e-3)


async def test_adapters_of_one_model_and_the_model_itself_answer_side_by_side_as_in_transformers(
    folder: Path, adapter: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = Path(shutil.copytree(adapter, tmp_path / adapter.name))  # of the same name, in another folder
    weights = other / "adapter_model.safetensors"
    save_file({name: -value if "lora_B" in name else value for name, value in load_file(weights).items()}, weights)

    async def answers(name: Any) -> list[Completion]:
        engines = load_engines(name, folder, dtype="float32", device=DEVICE, adapters=[None, adapter, other])
        sampling = replace(GREEDY, max_tokens=24, logprobs=True)
        done = await asyncio.gather(*(complete(engine, prompt, sampling) for prompt in PROMPTS for engine in engines))
        for engine in engines:
            await engine.close()
        return [completion for (completion,) in done]

    own, expected = await answers("vllm"), await answers("transformers")
    for one, other_one in zip(own, expected, strict=True):
        assert (one.ids, one.finish) == (other_one.ids, other_one.finish)
        assert one.logprobs == pytest.approx(other_one.logprobs, abs=1e-3)
    assert len({completion.ids for completion in expected[-3:]}) == 3, "they are different models"


def test_an_adapter_of_a_rank_that_vllm_does_not_have_is_refused_before_it_starts(folder: Path, tmp_path: Path) -> None:
    adapter = write_adapter(folder, tmp_path, rank=513)
    with pytest.raises(ModelError, match="513"):
        VllmEngine(folder, dtype="float32", device=DEVICE, adapters=[adapter])


def test_another_device_than_that_of_this_build_is_refused(folder: Path) -> None:
    other = "cuda" if DEVICE == "cpu" else "cpu"
    with pytest.raises(ModelError, match=f"'{other}'") as caught:
        load_engine("vllm", folder, dtype="float32", device=other)
    assert "transformers" in (caught.value.hint or "")


def test_a_model_that_vllm_does_not_take_is_an_error_of_the_model(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"rope_parameters": {"rope_type": "nonsense"}}))
    with pytest.raises(ModelError, match="vLLM cannot load") as caught:
        VllmEngine(broken, dtype="float32", device=DEVICE)
    assert caught.value.where == str(broken)


def _computes(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(process.cmdline())
    return False


async def test_smollm2_computes_as_in_transformers_to_the_tolerance_between_engines() -> None:
    async def measured(name: Any) -> list[list[float]]:
        opened = open_model("asset:smollm2-135m-instruct", name)
        async with opened.answerer.engine as engine:
            sets = contract.make_probes(opened.answerer.template)
            return [await engine.score(probe.ids, probe.start) for probe in sets]

    own, expected = await measured("vllm"), await measured("transformers")
    check = contract.compare_logprobs("vllm", own, expected, contract.ACROSS_ENGINES)
    print(check.detail)
    assert check.passed, check.detail


# Last: it kills the engine it is given.
async def test_where_its_processes_die_requests_fail_and_it_says_that_it_is_not_ready(adapted: Engine) -> None:
    deltas = aiter(adapted.submit(PROMPTS[1], long_run(n=2)))
    await anext(deltas)
    workers = [p for p in psutil.Process().children(recursive=True) if not p.children() and _computes(p)]
    for process in workers:
        process.kill()
    with pytest.raises(EngineError):
        async for _ in deltas:
            pass
    await asyncio.to_thread(wait_for, lambda: not adapted.ready)
    with pytest.raises(EngineError, match="load the engine again"):
        await complete(adapted, PROMPTS[1], Sampling(max_tokens=2))
    await adapted.close()
