from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.evaluation.inference import Item, compute_option_logprobs, generate_answers, option_logprob
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
            prompt = await answerer.encode_prompt(stem)
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
