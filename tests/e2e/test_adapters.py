"""An adapter that a run trained is a model wherever a model is named: on its base, it answers as the merged one."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.request
from pathlib import Path

import pytest

from corral.answering.open_model import open_model
from corral.engines.base import Sampling
from corral.messages import Conversation
from tests.e2e.conftest import corral
from tests.e2e.test_serve import address, serving

ASKED = [f"What is {i} plus {i}?" for i in range(4)]


@pytest.fixture(scope="module")
def adapter(finished: Path) -> Path:
    return finished / "run" / "train-1-sft" / "adapter"


def answers(spec: Path) -> list[tuple[str, tuple[float, ...], float]]:
    """Greedy text with its log-probabilities, and the score of one given answer."""

    async def ask() -> list[tuple[str, tuple[float, ...], float]]:
        opened = open_model(str(spec), "transformers", Sampling(max_tokens=16, logprobs=True))
        async with opened.answerer.engine:
            found: list[tuple[str, tuple[float, ...], float]] = []
            for asked in ASKED:
                answer = await opened.answerer.answer(Conversation.from_turns(("user", asked)))
                score = await opened.answerer.score(Conversation.from_turns(("user", asked), ("assistant", "It is 6.")))
                found.append((answer.text, answer.completions[0].logprobs or (), score.nll))
            return found

    return asyncio.run(ask())


def test_it_says_what_the_merged_model_says_as_surely(adapter: Path, finished: Path, tiny_folder: Path) -> None:
    unmerged, merged, base = answers(adapter), answers(finished / "run"), answers(tiny_folder)
    for one, other in zip(unmerged, merged, strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=2e-3)
        assert one[2] == pytest.approx(other[2], abs=2e-3)
    assert [nll for _, _, nll in unmerged] != pytest.approx([nll for _, _, nll in base], abs=0.1), "it was trained"


def test_chat_and_serve_take_it(adapter: Path, finished: Path) -> None:
    options = ("--max-tokens", 8, "--temperature", 0)
    talks = [corral("chat", spec, *options, input=f"{ASKED[3]}\n") for spec in (adapter, finished / "run")]
    assert [talk.returncode for talk in talks] == [0, 0], talks[0].stderr
    assert talks[0].stdout == talks[1].stdout
    with serving(adapter) as (said, _):
        body = {"messages": [{"role": "user", "content": ASKED[3]}], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{address(said)}/v1/chat/completions",
            json.dumps({"model": "tiny-train-1-sft", **body}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"]
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)  # a terminal is not steered by what a model says
    assert shown.strip()
    assert shown in talks[0].stdout
