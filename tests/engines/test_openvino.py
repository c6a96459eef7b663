from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from corral.engines import openvino as engines
from corral.engines.base import Completion, Delta, Engine, Generation, Sampling
from corral.engines.openvino import OpenVinoEngine
from corral.engines.transformers import TransformersEngine
from corral.errors import EngineClosedError, EngineError, EngineUnavailableError, ModelError
from corral.export.contract import TOLERANCES, compare_logprobs
from corral.model.openvino_graph import MODEL_FILE, write_model
from tests.engines.conformance import (
    DRAWN,
    GREEDY,
    EngineConformance,
    Subject,
    complete,
    deltas_of,
    finishes,
    long_run,
    wait_for,
)
from tests.engines.test_transformers import PROMPTS, model
from tests.engines.tiny import CONTEXT, VOCABULARY, generated, random_ids, scores, tiny_llama

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def form(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as an OpenVINO folder, in float32."""
    folder, form = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("form")
    tiny_llama().save_pretrained(folder)
    write_model(folder, form, "f32")
    shutil.copyfile(folder / "config.json", form / "config.json")
    return form


@pytest.fixture(scope="module")
def shared(form: Path) -> Iterator[OpenVinoEngine]:
    """One engine for tests that leave it as they found it."""
    engine = OpenVinoEngine(form)
    yield engine
    asyncio.run(engine.close())


class TestConformance(EngineConformance):
    @pytest.fixture
    def subject(self, form: Path) -> Subject:
        return Subject(lambda: OpenVinoEngine(form), PROMPTS)


@pytest.mark.parametrize("least", [{"temperature": 1e-40}, {"temperature": 1e-46}, {"top_p": 1e-50}], ids=str)
async def test_what_rounds_to_zero_in_32_bits_leaves_the_most_likely_ids(form: Path, least: dict[str, float]) -> None:
    async with OpenVinoEngine(form) as engine:
        greedy = Sampling(max_tokens=12)
        (expected,) = await complete(engine, PROMPTS[0], greedy)
        (drawn,) = await complete(engine, PROMPTS[0], replace(greedy, **({"temperature": 1.0, "seed": 1} | least)))
        assert drawn.ids == expected.ids


def child_of(engine: OpenVinoEngine) -> psutil.Process:
    return psutil.Process(engine._child.pid)


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# ---- n choices of one prompt


async def test_choices_stream_side_by_side(shared: OpenVinoEngine) -> None:
    deltas = await deltas_of(shared.submit(PROMPTS[3], long_run(n=3)))
    order = [delta.choice for delta in deltas]
    assert set(order[:9]) == {0, 1, 2}, "each has begun before any has got far"
    for choice in range(3):
        own = [delta for delta in deltas if delta.choice == choice]
        assert len(own) > 500, "ids come as they are computed, not in a lump"
    assert finishes(deltas) == {0: ["length"], 1: ["length"], 2: ["length"]}


LONG = random_ids(1500)
"""Takes the leader several steps, in which its followers wait."""


@pytest.mark.parametrize("prompt", [LONG, random_ids(40), random_ids(20)], ids=len)
@pytest.mark.parametrize("cancelled", [{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 1, 2}], ids=str)
async def test_any_choices_may_be_cancelled_before_the_prompt_is_computed(
    shared: OpenVinoEngine, prompt: list[int], cancelled: set[int]
) -> None:
    sampling = replace(DRAWN, n=3)
    whole = await complete(shared, prompt, sampling)
    generation = shared.submit(prompt[::-1], sampling)  # no prefix that is cached already
    for choice in cancelled:
        generation.cancel(choice)
    cut = await generation.completions()
    assert await complete(shared, prompt, sampling) == whole
    whole = await complete(shared, prompt[::-1], sampling)
    for choice in range(3):
        if choice in cancelled:
            assert cut[choice].finish == "cancelled"  # the child may have been quicker by a token
            assert cut[choice].ids == whole[choice].ids[: len(cut[choice].ids)]
        else:
            assert cut[choice] == whole[choice]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 512, 513])
async def test_prompts_around_the_size_of_a_block_are_answered_as_by_transformers_the_second_time_too(
    shared: OpenVinoEngine, length: int
) -> None:
    prompt = random_ids(length)
    first, second = [
        await complete(shared, prompt, replace(GREEDY, n=2, max_tokens=40, logprobs=True)) for _ in range(2)
    ]
    ids = first[0].ids
    assert list(ids) == generated(model(), prompt, 40)
    expected = scores(model(), [*prompt, *ids], length)
    for completion in (*first, *second):
        assert completion.ids == ids
        assert completion.logprobs == pytest.approx(expected, abs=1e-3)


async def test_scores_are_those_of_transformers_also_of_what_was_just_generated(shared: OpenVinoEngine) -> None:
    for length in (2, 32, 256, 257, 700, CONTEXT):
        ids = random_ids(length)
        assert await shared.score(ids) == pytest.approx(scores(model(), ids), abs=1e-3)
    (completion,) = await complete(shared, LONG, replace(DRAWN, max_tokens=70))
    ids = [*LONG, *completion.ids]
    expected = scores(model(), ids)
    for _ in range(2):
        assert await shared.score(ids) == pytest.approx(expected, abs=1e-3)


async def test_the_most_likely_ids_are_those_of_transformers(shared: OpenVinoEngine) -> None:
    for length, start in ((2, 1), (257, 1), (700, 600)):
        ids = random_ids(length)
        with torch.no_grad():
            best = model()(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1).topk(5)
        scored = await shared.score_top(ids, start, 5)
        assert [[id_ for id_, _ in score.top] for score in scored] == best.indices.tolist()
        values = [value for score in scored for _, value in score.top]
        assert values == pytest.approx(best.values.flatten().tolist(), abs=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=80, repetition_penalty=1.7),
        Sampling(max_tokens=80, frequency_penalty=0.7, presence_penalty=-0.5),
        Sampling(max_tokens=80, repetition_penalty=1.3, frequency_penalty=2.0, logit_bias=((5, 9.0), (6, -4.0))),
        Sampling(max_tokens=80, min_tokens=70, stop_ids=tuple(range(0, VOCABULARY, 3)), presence_penalty=2.0),
    ],
    ids=["repetition", "frequency and presence", "all", "min_tokens"],
)
async def test_penalties_and_biases_are_those_of_the_transformers_engine(
    shared: OpenVinoEngine, sampling: Sampling
) -> None:
    async with TransformersEngine(model()) as reference:
        for prompt in (PROMPTS[2], random_ids(300)):
            assert await complete(shared, prompt, sampling) == await complete(reference, prompt, sampling)


@pytest.mark.parametrize("more", [{"frequency_penalty": 1.0}, {"logprobs": True, "top_logprobs": 2}], ids=str)
async def test_choices_that_genai_does_not_compute_alone_take_turns_and_may_be_cancelled(
    shared: OpenVinoEngine, more: dict[str, Any]
) -> None:
    sampling = replace(DRAWN, n=7, max_tokens=40, **more)
    alone = await complete(shared, PROMPTS[3], sampling)
    generation = shared.submit(PROMPTS[3], sampling)
    beside = asyncio.create_task(complete(shared, PROMPTS[3], sampling))
    generation.cancel(1)
    generation.cancel(6)
    for choice, completion in enumerate(await generation.completions()):
        if choice in (1, 6):
            assert completion.finish == "cancelled"
        else:
            assert completion.ids == alone[choice].ids
    assert [completion.ids for completion in await beside] == [completion.ids for completion in alone]
    late = shared.submit(PROMPTS[3], replace(sampling, max_tokens=1500))
    asyncio.get_running_loop().call_later(0.02, late.cancel)
    assert {completion.finish for completion in await late.completions()} == {"cancelled"}
    again = await complete(shared, PROMPTS[3], sampling)
    assert [completion.ids for completion in again] == [completion.ids for completion in alone]


@pytest.fixture(scope="module")
def tight(form: Path) -> Iterator[OpenVinoEngine]:
    """An engine whose cache holds one or two texts of the length it allows, where OpenVINO would take blocks back."""
    with pytest.MonkeyPatch.context() as patched:
        size = engines._ModelSize(VOCABULARY, 200, blocks=12, parameters=1000)
        patched.setattr(engines._ModelSize, "fitting", lambda folder, itemsize: size)
        engine = OpenVinoEngine(form)
    yield engine
    asyncio.run(engine.close())


async def test_a_cache_too_small_for_all_changes_no_answer(tight: OpenVinoEngine, shared: OpenVinoEngine) -> None:
    shapes = [(30 + 7 * i, replace(DRAWN, n=4, max_tokens=60, seed=i, logprobs=True)) for i in range(6)]
    texts = [random_ids(150 + i) for i in range(8)]

    async def answers(engine: Engine) -> list[list[Completion]]:
        for text, scored in zip(texts, await asyncio.gather(*map(engine.score, texts)), strict=True):
            assert scored == pytest.approx(scores(model(), text), abs=1e-3)
        return await asyncio.gather(*(complete(engine, random_ids(length), sampling) for length, sampling in shapes))

    for (length, _), ours, theirs in zip(shapes, await answers(tight), await answers(shared), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.ids == other.ids
            expected = scores(model(), [*random_ids(length), *one.ids], length)
            assert one.logprobs == pytest.approx(expected, abs=1e-3)


async def test_prompts_that_share_a_beginning_in_a_full_cache_are_answered_right_while_others_are_cancelled(
    tight: OpenVinoEngine,
) -> None:
    beginning = random_ids(96)
    prompts = [beginning[: 32 * (i % 4)] + random_ids(5 + i) for i in range(24)]
    sampling = replace(DRAWN, n=2, max_tokens=30, logprobs=True)

    async def one(number: int, prompt: list[int]) -> list[Completion]:
        generation = tight.submit(prompt, sampling)
        got: list[Delta] = []
        async for delta in generation:
            got.append(delta)
            if number % 3 == 0 and len(got) == number % 7:
                generation.cancel(number % 2)
        return [
            Completion(
                tuple(id_ for delta in got if delta.choice == choice for id_ in delta.ids),
                tuple(value for delta in got if delta.choice == choice for value in delta.logprobs or ()),
                "length",
            )
            for choice in range(2)
        ]

    for _ in range(2):  # the second time, with a cache that is full of the first
        answers = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
        for prompt, completions in zip(prompts, answers, strict=True):
            for completion in completions:
                expected = scores(model(), [*prompt, *completion.ids], len(prompt))
                assert completion.logprobs == pytest.approx(expected, abs=1e-3)
        assert sum(len(completion.ids) == 30 for completions in answers for completion in completions) >= 40


# ---- seeds


async def test_a_seed_gives_the_same_ids_in_another_process_and_no_seed_others(
    form: Path, shared: OpenVinoEngine
) -> None:
    work = [(prompt, replace(DRAWN, n=5, max_tokens=30, seed=seed)) for prompt in PROMPTS for seed in (0, 2**40, -1)]

    async def together(engine: Engine) -> list[list[Completion]]:
        return await asyncio.gather(*(complete(engine, *each) for each in work))

    alone = [await complete(shared, *each) for each in work]
    async with OpenVinoEngine(form) as other:
        assert child_of(other) != child_of(shared)
        assert await together(other) == alone == await together(shared)
    assert len({completion.ids for completions in alone for completion in completions}) == 5 * len(work)
    unseeded = replace(DRAWN, n=5, max_tokens=30, seed=None)
    drawn = [await complete(shared, PROMPTS[2], unseeded) for _ in range(4)]
    assert len({completion.ids for completions in drawn for completion in completions}) == 20


# ---- the child dies


@pytest.fixture
def engine(form: Path) -> Iterator[OpenVinoEngine]:
    """An engine of one test's own."""
    engine = OpenVinoEngine(form)
    yield engine
    asyncio.run(engine.close())


async def begun(generation: Generation) -> None:
    """Wait for the first ids, leaving the rest to come."""
    stream = generation.__aiter__()
    await anext(stream)


async def until_ready(engine: OpenVinoEngine, restarts: int) -> None:
    await asyncio.to_thread(wait_for, lambda: engine.restarts == restarts and engine.ready)


async def test_a_killed_child_is_an_error_for_all_it_did_and_another_is_started(engine: OpenVinoEngine) -> None:
    expected = await complete(engine, PROMPTS[2], replace(DRAWN, n=3))
    scored = await engine.score(PROMPTS[2])
    for restarts in (1, 2):
        child = child_of(engine)
        work: list[Any] = [asyncio.create_task(complete(engine, prompt, long_run(n=2))) for prompt in PROMPTS]
        work += [asyncio.create_task(engine.score(random_ids(2000))) for _ in range(50)]
        await begun(engine.submit(PROMPTS[0], long_run()))
        os.kill(child.pid, signal.SIGKILL)
        for result in await asyncio.gather(*work, return_exceptions=True):
            assert isinstance(result, EngineUnavailableError)
            assert "signal 9" in str(result)
            assert "ask again" in (result.hint or "")
            assert result.retry_seconds
        await until_ready(engine, restarts)
        assert ended(child)
        assert child_of(engine) != child
        assert await complete(engine, PROMPTS[2], replace(DRAWN, n=3)) == expected
        assert await engine.score(PROMPTS[2]) == pytest.approx(scored, abs=1e-4)


async def test_a_child_killed_while_idle_is_replaced_without_a_request(engine: OpenVinoEngine) -> None:
    expected = await complete(engine, PROMPTS[2], DRAWN)
    child = child_of(engine)
    child.kill()
    await until_ready(engine, 1)
    assert ended(child)
    assert await complete(engine, PROMPTS[2], DRAWN) == expected


async def test_a_stopped_child_is_noticed_and_replaced(engine: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corral.engines.child_process._IDLE_SECONDS", 1.0)
    expected = await complete(engine, PROMPTS[2], DRAWN)
    child = child_of(engine)
    work = asyncio.create_task(complete(engine, PROMPTS[1], long_run(n=2)))
    await begun(engine.submit(PROMPTS[0], long_run()))
    child.suspend()
    with pytest.raises(EngineUnavailableError, match="computed nothing"):
        await work
    with contextlib.suppress(EngineUnavailableError):  # the next child may be quick
        await complete(engine, PROMPTS[2], DRAWN)
    await until_ready(engine, 1)
    assert ended(child)
    assert await complete(engine, PROMPTS[2], DRAWN) == expected


async def test_a_child_that_cannot_start_again_is_an_error_each_time_until_it_can(form: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(form, tmp_path / "form"))
    async with OpenVinoEngine(folder) as engine:
        shutil.rmtree(folder)
        child_of(engine).kill()
        await asyncio.to_thread(wait_for, lambda: engine.restarts == 2)
        for ask in (lambda: complete(engine, PROMPTS[2], DRAWN), lambda: engine.score(PROMPTS[2])):
            with pytest.raises(EngineUnavailableError, match=str(folder)):
                await ask()
        assert not engine.ready
        assert str(folder) not in str(engine.fault), "anybody may see it"
        shutil.copytree(form, folder)
        await asyncio.to_thread(wait_for, lambda: engine.ready)
        assert len(await engine.score(PROMPTS[2])) == len(PROMPTS[2]) - 1


async def test_what_one_request_breaks_spares_the_others_and_the_child(shared: OpenVinoEngine) -> None:
    child = child_of(shared)
    running = asyncio.create_task(complete(shared, PROMPTS[1], long_run()))
    for n in (1, 3):
        with pytest.raises(EngineError):
            await complete(shared, PROMPTS[2], replace(DRAWN, n=n, stop_ids=(2**70,)))
    assert [completion.finish for completion in await running] == ["length"]
    assert child_of(shared) == child


async def test_a_model_whose_logits_are_not_numbers_scores_nothing_and_says_so(tmp_path: Path) -> None:
    broken = tiny_llama()
    with torch.no_grad():
        for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "lm_head"):
            broken.get_submodule(name).weight.mul_(1e38)
    broken.save_pretrained(tmp_path / "model")
    (tmp_path / "form").mkdir()
    write_model(tmp_path / "model", tmp_path / "form", "f32")
    shutil.copyfile(tmp_path / "model" / "config.json", tmp_path / "form" / "config.json")
    async with OpenVinoEngine(tmp_path / "form") as engine:
        for _ in range(2):
            with pytest.raises(EngineError, match="not finite numbers"):
                await engine.score(PROMPTS[2])


# ---- cancelling and closing


def cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


async def test_cancelled_work_is_not_computed(shared: OpenVinoEngine) -> None:
    child = child_of(shared)
    started = cpu(child)
    whole = shared.submit(PROMPTS[2], long_run(n=20))
    await whole.completions()
    full = cpu(child) - started
    for _ in range(10):
        generation = shared.submit(PROMPTS[2], long_run(n=20))
        async for _ in generation:
            break
    task = [asyncio.create_task(shared.score(LONG)) for _ in range(100)]
    await asyncio.sleep(0)
    for each in task:
        each.cancel()
    await complete(shared, PROMPTS[2], GREEDY)
    await asyncio.sleep(1)
    spent = cpu(child)
    await asyncio.sleep(0.5)
    assert cpu(child) - spent < 0.1, "it is idle"
    assert spent - started - full < full, "ten times the work was begun, and next to nothing of it done"


async def test_closing_ends_the_child_at_once_whatever_it_computes(form: Path) -> None:
    engine = OpenVinoEngine(form)
    child = child_of(engine)
    work: list[Any] = [asyncio.create_task(complete(engine, PROMPTS[3], long_run(n=50)))]
    work += [asyncio.create_task(engine.score(LONG)) for _ in range(20)]
    await begun(engine.submit(PROMPTS[0], long_run()))
    await engine.close()
    assert ended(child)
    for result in await asyncio.gather(*work, return_exceptions=True):
        assert isinstance(result, EngineClosedError)
    await asyncio.sleep(0.1)
    assert engine.restarts == 0, "what is cancelled by then starts no other"


def test_nothing_is_left_of_engines_that_were_closed_or_never_opened(form: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(form, tmp_path / "form"))
    (broken / MODEL_FILE).write_text("<net>")

    def left() -> tuple[int, int, int]:
        me = psutil.Process()
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(me.children())

    async def test() -> None:
        engine = OpenVinoEngine(form)
        await engine.score(PROMPTS[1])
        child_of(engine).kill()
        await until_ready(engine, 1)
        await engine.score(PROMPTS[1])
        child_of(engine).kill()
        await engine.close()
        with pytest.raises(ModelError):
            OpenVinoEngine(broken)

    asyncio.run(test())
    before = left()
    asyncio.run(test())
    assert left() == before


PROGRAM = """
import asyncio, os, signal, sys
from pathlib import Path
from corral.engines.base import Sampling
from corral.engines.openvino import OpenVinoEngine

async def main():
    engine = OpenVinoEngine(Path(sys.argv[1]))
    async for delta in engine.submit([1], Sampling(max_tokens=2000)):
        break
    engine.submit([1], Sampling(max_tokens=2000, n=100))
    print(engine._child.pid, flush=True)
    await then(engine)

"""


def program(form: Path, then: str) -> subprocess.Popen[str]:
    """In a process group of its own; prints the child's pid, and then does what `then` says."""
    code = PROGRAM + f"async def then(engine):\n    {then}\n\nasyncio.run(main())\n"
    return subprocess.Popen(
        [sys.executable, "-c", code, str(form)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_number(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_program_that_forgets_to_close_still_ends_and_so_does_the_child(form: Path) -> None:
    parent = program(form, "pass")
    child = first_number(parent)
    _, errors = parent.communicate()
    assert (parent.returncode, errors) == (0, "")
    wait_for(lambda: not psutil.pid_exists(child) or ended(psutil.Process(child)))


def test_the_child_of_a_killed_program_ends_by_itself(form: Path) -> None:
    parent = program(form, "await asyncio.sleep(1000)")
    child = psutil.Process(first_number(parent))
    assert not ended(child)
    parent.kill()
    parent.communicate()
    wait_for(lambda: ended(child))


def test_an_interrupt_of_the_whole_group_is_the_programs_to_handle(form: Path) -> None:
    then = "signal.signal(signal.SIGINT, lambda *a: print('interrupted', flush=True)); print(1, flush=True); "
    then += "await asyncio.to_thread(sys.stdin.readline); print(len(await engine.score([1, 2, 3])), engine._child.pid)"
    parent = program(form, then)
    child = first_number(parent)
    assert first_number(parent) == 1
    os.killpg(parent.pid, signal.SIGINT)
    output, errors = parent.communicate("go on\n")
    assert (parent.returncode, errors) == (0, "")
    assert output.split() == ["interrupted", "2", str(child)]


# ---- what is refused


def damaged(name: str, change: Callable[[Path], Any]) -> Any:
    return pytest.param(change, id=name)


@pytest.mark.parametrize(
    "damage",
    [
        damaged("weights cut short", lambda form: os.truncate(form / "openvino_model.bin", 1000)),
        damaged("weights missing", lambda form: (form / "openvino_model.bin").unlink()),
        damaged("graph cut short", lambda form: os.truncate(form / MODEL_FILE, 5000)),
        damaged("graph is garbage", lambda form: (form / MODEL_FILE).write_bytes(b"\x00\xff garbage")),
        damaged("graph is empty", lambda form: (form / MODEL_FILE).write_bytes(b"")),
        damaged("config missing", lambda form: (form / "config.json").unlink()),
        damaged("config is no object", lambda form: (form / "config.json").write_text("[]")),
        damaged("config is garbage", lambda form: (form / "config.json").write_bytes(b"\xff{")),
    ],
)
def test_a_damaged_folder_is_refused_and_no_process_is_left(form: Path, tmp_path: Path, damage: Any) -> None:
    folder = Path(shutil.copytree(form, tmp_path / "form"))
    damage(folder)
    children = psutil.Process().children()
    with pytest.raises(ModelError) as caught:
        OpenVinoEngine(folder)
    assert caught.value.where == str(folder)
    assert "Traceback" not in str(caught.value)
    assert psutil.Process().children() == children


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        OpenVinoEngine(tmp_path)


def test_another_dtype_is_refused_with_those_there_are(form: Path) -> None:
    with pytest.raises(ModelError, match="float16") as caught:
        OpenVinoEngine(form, dtype="float16")
    assert "bfloat16" in (caught.value.hint or "")


# ---- other ways to open one


async def test_a_llama_folder_is_converted_and_answers_as_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openvino.py").write_text("raise SystemError('not the package')")
    tiny_llama().save_pretrained(tmp_path / "model")
    async with OpenVinoEngine(Path("model")) as engine:
        assert await engine.score(PROMPTS[3]) == pytest.approx(scores(model(), PROMPTS[3]), abs=1e-3)


async def test_a_model_whose_folder_moves_is_still_there_for_the_next_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "model")
    async with OpenVinoEngine(tmp_path / "model") as engine:
        expected = await complete(engine, PROMPTS[2], GREEDY)
        (tmp_path / "model").rename(tmp_path / "superseded")
        child_of(engine).kill()
        await until_ready(engine, 1)
        assert await complete(engine, PROMPTS[2], GREEDY) == expected


async def test_bfloat16_is_within_the_tolerance_that_contracts_have_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path / "cache"))
    tiny_llama().save_pretrained(tmp_path / "model")
    texts = [random_ids(length) for length in (100, 200, 300)]
    async with OpenVinoEngine(tmp_path / "model", dtype="bfloat16") as engine:
        (completion,) = await complete(engine, PROMPTS[3], replace(GREEDY, max_tokens=40))
        assert completion.finish == "length"
        scored = [await engine.score(text) for text in texts]
    expected = [scores(model(), text) for text in texts]
    check = compare_logprobs("bfloat16", scored, expected, TOLERANCES["bfloat16"])
    assert check.passed, check.detail
