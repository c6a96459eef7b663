from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import RequestError
from corral.evaluation.inference import (
    Item,
    Refusals,
    TextItem,
    compute_losses,
    compute_option_logprobs,
    generate_answers,
    option_logprob,
)
from corral.evaluation.question_sets import Question
from corral.evaluation.row_file import RowFile, RowProducer
from corral.messages import Conversation
from corral.prompting.few_shot import Prompting
from corral.template import Template

ME = RowProducer("tuned", "abc")


def test_all_candidates_and_examples_are_counted_and_the_answer_is_graded(template: Template, tmp_path: Path) -> None:
    from corral.answering.consensus import Consensus

    example = Conversation.from_turns(("user", "before"), ("assistant", "yes"))
    item = Item("a", Conversation.from_turns(("user", "now"), ("assistant", "x")), lambda text: {"graded": text})

    async def answer(**settings: Any) -> dict[str, Any]:
        async with ScriptedEngine([65, 66, 67]) as engine:
            file = RowFile(tmp_path / f"{len(settings)}.jsonl")
            await generate_answers(
                Answerer(engine, template, Sampling(8), **settings), ME, [item], file, lambda done: None
            )
            return dict(file.rows_of(ME)["a"])

    plain = asyncio.run(answer())
    shown = asyncio.run(answer(prompting=Prompting([example], 1), consensus=Consensus("rouge-l", n=3, stop="never")))
    assert (plain["tokens"], shown["tokens"]) == (3, 9)
    assert shown["candidates"] == [shown["answer"]] * 3
    assert (shown["finishes"], shown["votes"], shown["winner"]) == (["stop"] * 3, [1.0] * 3, 0)
    assert "candidates" not in plain
    more = len(template.prompt(Conversation((*example.messages, *item.conversation.messages[:1]))))
    assert (plain["prompt_tokens"], shown["prompt_tokens"]) == (
        len(template.prompt(Conversation.from_turns(("user", "now")))),
        more,
    )
    assert shown["graded"] == shown["answer"]
    assert shown["prompt"] == [{"role": "user", "content": "now"}]


@pytest.mark.parametrize("shots", [0, 2])
def test_an_options_log_probability_equals_a_direct_computation(
    tiny_folder: Path, template: Template, tmp_path: Path, shots: int
) -> None:
    import torch

    from corral.engines.transformers import TransformersEngine
    from corral.model.loading import load_model

    model: Any = load_model(tiny_folder, dtype="float32", device="cpu")
    question = Question("Where?\nA. at sea\nB. on land", "B. on land", ("on land",), ("at sea", "on land"), "Where?")
    examples = [Conversation.from_turns(("user", f"Where is {i}?"), ("assistant", "at sea")) for i in range(3)]
    prompting = Prompting(examples, shots)
    stem = Conversation.from_turns(("user", "Where?"))

    async def scored() -> dict[str, Any]:
        async with TransformersEngine(model) as engine:
            answerer = Answerer(engine, template, prompting=prompting)
            file = RowFile(tmp_path / "options.jsonl")
            await compute_option_logprobs(answerer, ME, [question], file, lambda done: None)
            prompt = (await answerer.encode_prompt(stem)).ids
            assert file.rows_of(ME)[question.id]["logprobs"][1] == await option_logprob(
                answerer, prompt, stem, "on land"
            )
            return dict(file.rows_of(ME)[question.id])

    row = asyncio.run(scored())
    assert (row["bytes"], row["gold"]) == ([6, 7], 1)
    prompt = Conversation((*(m for shot in prompting.choose_examples(stem) for m in shot.messages), *stem.messages))
    assert len(prompt.messages) == 2 * shots + 1
    for option, logprob in zip(question.options, row["logprobs"], strict=True):
        ids = template.prompt(prompt)
        answer = template.tokenizer.encode(option, add_special_tokens=False)
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
        direct = sum(float(logprobs[len(ids) + i - 1, id_]) for i, id_ in enumerate(answer))
        assert logprob == pytest.approx(direct, abs=1e-4)


LONG = Conversation.from_turns(("user", "word " * 300), ("assistant", "x"))
SHORT = Conversation.from_turns(("user", "now"), ("assistant", "x"))


@pytest.mark.parametrize("what", ["losses", "answers", "options"])
def test_an_overlong_row_is_finished_with_a_reason_and_the_others_are_measured(
    template: Template, tmp_path: Path, what: str
) -> None:
    engine = ScriptedEngine([65])
    engine.features = replace(engine.features, max_length=200)
    answerer, file = Answerer(engine, template, Sampling(8)), RowFile(tmp_path / "rows.jsonl")
    done: list[int] = []

    async def measure(*conversations: Conversation) -> Refusals:
        items = [Item(f"{i}", conversation) for i, conversation in enumerate(conversations)]
        if what == "losses":
            return await compute_losses(answerer, ME, items, file, done.append)
        if what == "answers":
            return await generate_answers(answerer, ME, items, file, done.append)
        texts = [c.messages[0].content for c in conversations]
        questions = [Question(text, "B. on land", ("on land",), ("at sea", "on land"), text) for text in texts]
        return await compute_option_logprobs(answerer, ME, questions, file, done.append)

    refusals = asyncio.run(measure(LONG, LONG))
    assert {type(refusal) for refusal in refusals.values()} == {RequestError}
    assert file.rows_of(ME) == {}, "if every row is refused, the fault may not be in the rows"
    asyncio.run(measure(LONG, SHORT))
    reasons = [row.get("skipped") for row in file.rows_of(ME).values()]
    assert [reason is not None and "exceed" in reason for reason in reasons].count(True) == 1
    assert reasons.count(None) == 1
    assert done[-1] == 2
    before = file.path.read_bytes()
    asyncio.run(measure(LONG, SHORT))
    assert file.path.read_bytes() == before, "a skipped row is not asked again"


@pytest.mark.parametrize("limit", [512, 24])
def test_the_loss_of_a_documents_windows_adds_up_to_that_of_its_text(
    tiny_folder: Path, template: Template, tmp_path: Path, limit: int
) -> None:
    import torch

    from corral.data.plain_text import PlainTextEncoder, split_windows
    from corral.engines.transformers import TransformersEngine
    from corral.model.loading import load_model

    model: Any = load_model(tiny_folder, dtype="float32", device="cpu")
    text = "The ship sailed on the wide sea, and we had bread and wine. " * 2
    whole = PlainTextEncoder(template).encode(text)
    windows = split_windows(whole, limit)
    items = [TextItem(f"{i}", text, window, len(text), "document") for i, window in enumerate(windows)]
    file = RowFile(tmp_path / "losses.jsonl")

    async def measure() -> None:
        async with TransformersEngine(model) as engine:
            await compute_losses(Answerer(engine, template), ME, items, file, lambda done: None)

    asyncio.run(measure())
    rows = file.rows_of(ME)
    assert sum(row["tokens"] for row in rows.values()) == sum(whole.trained[1:])
    direct = 0.0
    for window in windows:
        with torch.inference_mode():
            logprobs = model(torch.tensor([window.ids])).logits[0].log_softmax(-1)
        pairs = enumerate(zip(window.ids[1:], window.trained[1:], strict=True))
        direct -= sum(float(logprobs[at, id_]) for at, (id_, trained) in pairs if trained)
    assert sum(row["nll"] for row in rows.values()) == pytest.approx(direct, abs=1e-3)
