from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from corral.engines.base import Completion, Generation, Sampling
from corral.engines.shared_model import SharedModel
from corral.engines.transformers import TransformersEngine
from corral.errors import EngineClosedError, EngineError
from tests.engines.conformance import DRAWN, GREEDY, EngineConformance, Failing, Subject, complete
from tests.engines.tiny import VOCABULARY, distribution, generated, tiny_llama

PROMPTS = ([3], [4, 5, 6], list(range(10, 30)), list(range(30, 130)))
POISON = 200
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head size, float32


@functools.cache
def model() -> LlamaForCausalLM:
    return tiny_llama()


async def complete_all(
    engine: TransformersEngine, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[Completion]]:
    async with engine:
        return await asyncio.gather(*(complete(engine, prompt, sampling) for prompt in prompts))


@functools.cache
def two_adapters() -> Any:
    """That model with two adapters that change it."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted_model: Any = get_peft_model(tiny_llama(), lora)
    adapted_model.add_adapter("other", lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in adapted_model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return adapted_model


@functools.cache
def shared_model() -> SharedModel:
    return SharedModel(two_adapters())


def spied_llama() -> tuple[LlamaForCausalLM, list[tuple[int, int]]]:
    """A model, and the (rows, columns) of ids of each forward pass."""
    shapes: list[tuple[int, int]] = []
    spied = tiny_llama()
    spied.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return spied, shapes


def not_a_number() -> LlamaForCausalLM:
    """A model that answers a prompt with POISON in it by NaN, and never draws POISON itself."""
    poisoned = tiny_llama()
    with torch.no_grad():
        poisoned.get_input_embeddings().weight[POISON] = float("nan")

    def never(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[..., POISON] = float("-inf")
        return logits

    poisoned.lm_head.register_forward_hook(never)
    return poisoned


class TestTransformersEngine(EngineConformance):
    @pytest.fixture(params=[128, 3], ids="max_batch={}".format)
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        return Subject(
            make=lambda: TransformersEngine(model(), max_batch=request.param),
            prompts=PROMPTS,
            failing=Failing(lambda: TransformersEngine(not_a_number(), max_batch=request.param), [5, POISON, 6]),
        )


class TestUnderAnAdapter(EngineConformance):
    """One of two adapters that take turns on one model."""

    @pytest.fixture
    def subject(self) -> Subject:
        return Subject(
            make=lambda: TransformersEngine(two_adapters(), turn=partial(shared_model().use, "other")), prompts=PROMPTS
        )


async def test_greedy_equals_generate_for_prompts_of_every_length_in_one_batch() -> None:
    prompts = [list(range(1, 1 + length)) for length in (1, 2, 3, 7, 20, 64, 65, 150)]
    answers = await complete_all(TransformersEngine(model()), prompts, replace(GREEDY, max_tokens=80))
    for prompt, (completion,) in zip(prompts, answers, strict=True):
        assert list(completion.ids) == generated(model(), prompt, 80)


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[::-1]], ids=["short first", "long first"])
async def test_requests_that_join_a_running_batch_are_answered_as_alone(prompts: Sequence[Sequence[int]]) -> None:
    async def read(generation: Generation, arrived: asyncio.Event) -> list[int]:
        ids: list[int] = []
        async for delta in generation:
            ids.extend(delta.ids)
            if len(ids) > 4:
                arrived.set()
        return ids

    async with TransformersEngine(model()) as engine:
        tasks: list[asyncio.Task[list[int]]] = []
        for i, prompt in enumerate(prompts):
            arrived = asyncio.Event()
            generation = engine.submit(prompt, replace(GREEDY, max_tokens=60 if i % 2 else 15))
            tasks.append(asyncio.create_task(read(generation, arrived)))
            await arrived.wait()
        for i, (prompt, task) in enumerate(zip(prompts, tasks, strict=True)):
            assert await task == generated(model(), prompt, 60 if i % 2 else 15)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=1.5, top_p=0.9),
        Sampling(temperature=0.7, top_p=0.6),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.3, top_k=20, top_p=0.7),
    ],
    ids=lambda s: f"T={s.temperature} top_p={s.top_p} top_k={s.top_k}",
)
async def test_first_ids_are_drawn_from_the_exact_distribution(sampling: Sampling) -> None:
    prompt, draws = [4, 5, 6], 4000
    sampling = replace(sampling, n=draws, max_tokens=1, seed=11)
    (completions,) = await complete_all(TransformersEngine(model(), max_batch=draws), [prompt], sampling)
    counts = Counter(completion.ids[0] for completion in completions)
    with torch.no_grad():
        logits: Any = model()(torch.tensor([prompt])).logits[0, -1]
    expected = distribution(logits, sampling) * draws
    assert set(counts) <= set(expected.nonzero().squeeze(1).tolist())
    # Pearson's chi-square; ids expected fewer than 5 times count as one. Mean k, variance 2k: 5 standard deviations.
    usual = [i for i in range(VOCABULARY) if expected[i] >= 5]
    pairs = [(counts[i], expected[i].item()) for i in usual]
    pairs.append((draws - sum(seen for seen, _ in pairs), draws - sum(likely for _, likely in pairs)))
    chi_square = sum((seen - likely) ** 2 / likely for seen, likely in pairs if likely > 1e-2)
    assert len(usual) >= 3
    assert chi_square < len(pairs) + 5 * (2 * len(pairs)) ** 0.5


def adapted() -> Any:
    """A fresh model under an adapter that changes what it says."""
    peft = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return peft


async def test_a_peft_model_answers_and_scores_with_its_adapter_and_without_dropout() -> None:
    peft = adapted().train()
    async with TransformersEngine(peft) as engine:
        (completion,) = await complete(engine, PROMPTS[2], replace(GREEDY, max_tokens=30, logprobs=True))
        scores = await engine.score([*PROMPTS[2], *completion.ids], len(PROMPTS[2]))
    assert list(completion.ids) == generated(peft, PROMPTS[2], 30)
    assert list(completion.ids) != generated(model(), PROMPTS[2], 30)
    assert scores == pytest.approx(completion.logprobs, abs=1e-3)


async def test_a_model_with_a_window_of_attention_is_used_within_it() -> None:
    windowed = tiny_llama()
    windowed.config.sliding_window = 100
    async with TransformersEngine(windowed) as engine:
        assert engine.features.max_length == 100


async def test_a_cache_too_small_for_all_changes_no_answer() -> None:
    sampling = replace(DRAWN, n=3, max_tokens=20)
    roomy = await complete_all(TransformersEngine(model()), PROMPTS, sampling)
    for tokens in (1, 60, 300):
        tight = TransformersEngine(model(), cache_bytes=tokens * BYTES_PER_TOKEN)
        assert await complete_all(tight, PROMPTS, sampling) == roomy


def steps(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Rows of each step that computes one token of each row."""
    return [rows for rows, columns in shapes if columns == 1]


async def test_a_batch_has_at_most_max_batch_rows_and_as_many_as_the_cache_holds() -> None:
    sampling = replace(DRAWN, n=4, max_tokens=20)
    spied, shapes = spied_llama()
    await complete_all(TransformersEngine(spied, max_batch=5), PROMPTS[:3], sampling)
    assert max(steps(shapes)) == 5
    shapes.clear()
    await complete_all(TransformersEngine(spied, cache_bytes=90 * BYTES_PER_TOKEN), PROMPTS[:3], sampling)
    assert max(steps(shapes)) == 4  # 21 tokens at most for each row of the shortest prompt


async def test_finished_and_cancelled_choices_leave_the_batch() -> None:
    spied, shapes = spied_llama()
    async with TransformersEngine(spied) as engine:
        long = engine.submit(PROMPTS[0], Sampling(n=2, max_tokens=300))
        await complete(engine, PROMPTS[1], Sampling(n=3, max_tokens=5))
        long.cancel(0)
        await long.completions()
    rows = steps(shapes)
    assert max(rows) == 5
    assert rows[-1] == 1
    assert rows.count(5) <= 5


async def test_a_prompt_is_computed_once_for_all_its_choices() -> None:
    spied, shapes = spied_llama()
    await complete_all(TransformersEngine(spied), [PROMPTS[3]], replace(DRAWN, n=6, max_tokens=3))
    assert shapes == [(1, len(PROMPTS[3]) - 1), (6, 1), (6, 1), (6, 1)]


async def test_prompts_of_unlike_lengths_are_not_padded_to_each_other() -> None:
    spied, shapes = spied_llama()
    prompts = [[1 + i] * length for i, length in enumerate((10, 1000, 20, 900, 1100))]
    await complete_all(TransformersEngine(spied), prompts, GREEDY)
    prefilled = sum(rows * columns for rows, columns in shapes if columns > 1)
    assert prefilled < 1.2 * sum(map(len, prompts))


async def test_waiting_scores_are_computed_together_in_bounded_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    from corral.model import packed_forward

    packs: list[int] = []
    score = packed_forward.score

    def spied(of: Any, sequences: Any, starts: Any) -> Any:
        packs.append(sum(map(len, sequences)))
        return score(of, sequences, starts)

    monkeypatch.setattr(packed_forward, "score", spied)
    async with TransformersEngine(model()) as engine:
        await asyncio.gather(*(engine.score([1 + i] * 200, 150) for i in range(100)))
    assert sum(packs) == 100 * 200
    assert max(packs) <= 4096
    assert len(packs) <= 8


async def test_a_step_that_fails_reaches_those_in_it_and_spares_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tiny_llama()
    calls = 0

    def fail_at_5(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise torch.OutOfMemoryError("on purpose")

    broken.register_forward_pre_hook(fail_at_5)
    async with TransformersEngine(broken, max_batch=4) as engine:
        running = [complete(engine, prompt, replace(GREEDY, n=2)) for prompt in PROMPTS]
        results = await asyncio.gather(*running, return_exceptions=True)
        failed = [result for result in results if isinstance(result, EngineError)]
        assert 1 <= len(failed) <= 2
        assert "OutOfMemoryError: on purpose" in str(failed[0])
        (completion,) = await complete(engine, PROMPTS[2], GREEDY)
        assert list(completion.ids) == generated(model(), PROMPTS[2], GREEDY.max_tokens)


async def test_a_prompt_or_score_that_fails_leaves_running_requests_alone() -> None:
    broken = tiny_llama()

    def fail_on_poison(module: Any, args: Any) -> None:
        if (args[0] == POISON).any() and args[0].shape[1] > 1:
            raise RuntimeError("on purpose")

    broken.model.embed_tokens.register_forward_pre_hook(fail_on_poison)
    async with TransformersEngine(broken) as engine:
        running = asyncio.create_task(complete(engine, PROMPTS[0], replace(GREEDY, max_tokens=400)))
        await complete(engine, PROMPTS[0], GREEDY)
        bad = [POISON] * 40
        for _ in range(2):
            with pytest.raises(EngineError, match="on purpose"):
                await complete(engine, bad, replace(GREEDY, n=3))
            with pytest.raises(EngineError, match="on purpose"):
                await engine.score(bad)
        (completion,) = await running
        assert list(completion.ids) == generated(model(), PROMPTS[0], 400)


async def test_what_is_not_a_number_does_not_outlive_its_request() -> None:
    async with TransformersEngine(not_a_number()) as engine:
        (alone,) = await complete(engine, PROMPTS[1], GREEDY)
        # Keeps the cache from being emptied between the two, and all columns in view.
        running = engine.submit(PROMPTS[3], replace(GREEDY, max_tokens=1500))
        with pytest.raises(EngineError, match="not finite"):
            await complete(engine, [POISON] * 60, replace(GREEDY, n=3))
        assert await complete(engine, PROMPTS[1], replace(GREEDY, n=3)) == [alone] * 3
        running.cancel()
        (completion,) = await running.completions()
        assert completion.finish == "cancelled"


async def test_nothing_hangs_when_the_worker_itself_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    engine = TransformersEngine(model())
    monkeypatch.setattr(engine._worker, "_drop_finished", lambda: 1 / 0)
    with pytest.raises(EngineClosedError):
        await complete(engine, PROMPTS[0], GREEDY)
    with pytest.raises(EngineClosedError):
        await engine.score(PROMPTS[2])
    await engine.close()


def test_a_program_that_forgets_to_close_still_ends() -> None:
    program = """
import asyncio
from tests.engines.tiny import tiny_llama
from corral.engines.base import Sampling
from corral.engines.transformers import TransformersEngine

async def main():
    engine = TransformersEngine(tiny_llama())
    async for delta in engine.submit([1], Sampling(max_tokens=2000)):
        break
    engine.submit([1], Sampling(max_tokens=2000))

asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
