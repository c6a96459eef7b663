"""The Answerer: text in and out over any engine, async and not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from corral.answerer import Answerer, blocking
from corral.engines.base import Sampling
from corral.engines.transformers import TransformersEngine
from corral.errors import EngineError, TemplateError
from corral.messages import Conversation
from corral.model.loading import load_model, load_tokenizer
from corral.model.packed import score
from corral.template import Template

ASKED = Conversation.of(("user", "What is two plus two?"))


@pytest.fixture
def answerer(tiny_folder: Path) -> Answerer:
    return Answerer(TransformersEngine(load_model(tiny_folder)), Template.load(load_tokenizer(tiny_folder)))


def test_streamed_text_equals_the_whole_answer_for_every_choice(answerer: Answerer) -> None:
    sampling = Sampling(max_tokens=24, n=3, temperature=1.0, seed=4)
    with blocking(answerer) as face:
        whole = face.answer(ASKED, sampling)
        texts = ["", "", ""]
        finishes = 0
        for delta in face.stream(ASKED, sampling):
            texts[delta.choice] += delta.text
            finishes += delta.finish is not None
    assert tuple(texts) == whole.texts
    assert finishes == 3
    assert len(set(texts)) > 1


def test_a_score_is_the_loss_on_the_answer_alone(answerer: Answerer, tiny_folder: Path) -> None:
    talk = ASKED.add("assistant", "Four.")
    encoded = answerer.template.encode(talk)
    with blocking(answerer) as face:
        found = face.score(talk)
    first = encoded.trained.index(True)
    (expected,) = score(load_model(tiny_folder), [encoded.ids], [first])
    trained = [p for p, t in zip(expected, encoded.trained[first:], strict=True) if t]
    assert found.tokens == len(trained)
    assert found.nll == pytest.approx(-sum(trained), rel=1e-4)


def test_leaving_a_stream_early_frees_the_engine(answerer: Answerer) -> None:
    with blocking(answerer) as face:
        for _ in face.stream(ASKED, Sampling(max_tokens=300, temperature=1.0)):
            break
        assert face.answer(ASKED, Sampling(max_tokens=4)).completions


def test_many_conversations_at_once(answerer: Answerer) -> None:
    async def work() -> list[str]:
        asked = [Conversation.of(("user", f"{i}?")) for i in range(20)]
        answers = await asyncio.gather(*(answerer.answer(c, Sampling(max_tokens=6)) for c in asked))
        return [a.text for a in answers]

    with blocking(answerer) as face:
        assert len(face.run(work())) == 20


def test_errors_of_template_and_engine_reach_the_caller(answerer: Answerer) -> None:
    with blocking(answerer) as face:
        with pytest.raises(TemplateError):
            face.answer(ASKED.add("assistant", "Four."))
        with pytest.raises(EngineError, match="exceed"):
            face.answer(ASKED, Sampling(max_tokens=10**6))
        with pytest.raises(EngineError, match="exceed"):
            list(face.stream(ASKED, Sampling(max_tokens=10**6)))
