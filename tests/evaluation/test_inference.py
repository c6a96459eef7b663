from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from corral.answering.answerer import Answerer
from corral.engines.base import Sampling
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError
from corral.evaluation.inference import Item, compute_option_logprobs, generate_answers, option_logprob
from corral.evaluation.question_sets import Question
from corral.evaluation.row_file import RowFile, RowOrigin
from corral.messages import Conversation
from corral.prompting.few_shot import Prompting
from corral.template import Template

ME = RowOrigin("tuned", "abc")


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def test_a_half_written_last_line_is_cut_off_and_done_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    RowFile(path).add(ME, "a", nll=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"variant": "tuned", "id": "b", "nl')
    again = RowFile(path)
    assert again.rows_of(ME).keys() == {"a"}
    again.add(ME, "b", nll=2.0)
    assert path.read_bytes().startswith(whole)
    assert RowFile(path).rows_of(ME).keys() == {"a", "b"}


def test_rows_of_other_settings_are_not_a_variants(tmp_path: Path) -> None:
    file = RowFile(tmp_path / "rows.jsonl")
    file.add(RowOrigin("tuned", "old"), "a", nll=1.0)
    assert file.rows_of(ME) == {}
    assert file.rows_of_variant("tuned").keys() == {"a"}


def test_taking_over_copies_the_wanted_lines_byte_for_byte_and_none_twice(tmp_path: Path) -> None:
    old = RowFile(tmp_path / "old.jsonl")
    for maker, id_ in (
        (ME, "a"),
        (RowOrigin("tuned", "other"), "a"),
        (RowOrigin("base", "x"), "a"),
        (ME, "b"),
        (ME, "not asked"),
    ):
        old.add(maker, id_, text="é 東京")
    old.path.write_bytes(old.path.read_bytes() + b'{"half')
    new = RowFile(tmp_path / "new" / "rows.jsonl")
    new.add(ME, "b", text="mine")
    mine = new.path.read_bytes()
    for _ in range(2):
        new.reuse_rows(old.path, {ME: {"a", "b"}})
    assert new.path.read_bytes() == mine + lines(old.path)[0]
    assert RowFile(new.path).rows_of(ME).keys() == {"a", "b"}
    new.reuse_rows(tmp_path / "no such file", {ME: {"a"}})


def test_a_failure_keeps_what_was_done_and_going_on_does_only_the_rest(template: Template, tmp_path: Path) -> None:
    items = [Item(str(i), Conversation.from_turns(("user", f"say {i}"), ("assistant", "x"))) for i in range(6)]
    asked: list[int] = []

    def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
        asked.append(len(asked))
        last = len(asked) == 6
        yield 65
        if last:  # the others are done by then
            yield from [65] * 20
            raise RuntimeError("a fault on purpose")

    async def go() -> None:
        async with ScriptedEngine(reply) as engine:
            file = RowFile(tmp_path / "rows.jsonl")
            await generate_answers(Answerer(engine, template, Sampling(32)), ME, items, file, lambda done: None)

    with pytest.raises(EngineError, match="a fault on purpose"):
        asyncio.run(go())
    done = lines(tmp_path / "rows.jsonl")
    assert 1 <= len(done) < 6
    so_far = len(asked)
    asyncio.run(go())
    assert len(asked) == so_far + 6 - len(done)
    assert lines(tmp_path / "rows.jsonl")[: len(done)] == done
    assert RowFile(tmp_path / "rows.jsonl").rows_of(ME).keys() == {item.id for item in items}


def test_all_candidates_and_examples_are_counted_and_the_judge_is_asked(template: Template, tmp_path: Path) -> None:
    from corral.answering.consensus import Consensus

    example = Conversation.from_turns(("user", "before"), ("assistant", "yes"))
    item = Item("a", Conversation.from_turns(("user", "now"), ("assistant", "x")), lambda text: {"said": text})

    async def go(**how: Any) -> dict[str, Any]:
        async with ScriptedEngine([65, 66, 67]) as engine:
            file = RowFile(tmp_path / f"{len(how)}.jsonl")
            await generate_answers(Answerer(engine, template, Sampling(8), **how), ME, [item], file, lambda done: None)
            return dict(file.rows_of(ME)["a"])

    plain = asyncio.run(go())
    shown = asyncio.run(go(prompting=Prompting([example], 1), consensus=Consensus("rouge-l", n=3, stop="never")))
    assert (plain["tokens"], shown["tokens"]) == (3, 9)
    assert shown["candidates"] == [shown["answer"]] * 3
    assert (shown["finishes"], shown["votes"], shown["winner"]) == (["stop"] * 3, [1.0] * 3, 0)
    assert "candidates" not in plain
    more = len(template.prompt(Conversation((*example.messages, *item.conversation.messages[:1]))))
    assert (plain["prompt_tokens"], shown["prompt_tokens"]) == (
        len(template.prompt(Conversation.from_turns(("user", "now")))),
        more,
    )
    assert shown["said"] == shown["answer"]
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
    asked = Conversation((*(m for shot in prompting.choose_examples(stem) for m in shot.messages), *stem.messages))
    assert len(asked.messages) == 2 * shots + 1
    for option, found in zip(question.options, row["logprobs"], strict=True):
        ids = template.prompt(asked)
        answer = template.tokenizer.encode(option, add_special_tokens=False)
        with torch.inference_mode():
            logprobs = model(torch.tensor([[*ids, *answer]])).logits[0].log_softmax(-1)
        direct = sum(float(logprobs[len(ids) + i - 1, id_]) for i, id_ in enumerate(answer))
        assert found == pytest.approx(direct, abs=1e-4)
