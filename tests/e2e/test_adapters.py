"""An adapter that a run trained can be named wherever a model can; it answers as the merged model does."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import urllib.request
from pathlib import Path

import pytest

from corral.answering.open_model import open_model
from corral.engines.base import Sampling
from corral.messages import Conversation
from corral.model.naming import find_model_files
from tests.conftest import write_workspace
from tests.e2e.test_serve import address, serving
from tests.forked import corral

QUESTIONS = [f"What is {i} plus {i}?" for i in range(4)]


@pytest.fixture(scope="module")
def adapter(finished_run: Path) -> Path:
    return finished_run / "train-1-sft" / "adapter"


def answer_and_score(model: Path) -> list[tuple[str, tuple[float, ...], float]]:
    """For each question the greedy answer, its log-probabilities, and the negative log-likelihood of a given answer."""

    async def work() -> list[tuple[str, tuple[float, ...], float]]:
        opened = open_model(str(model), "transformers")
        async with opened.answerer.engine:
            results: list[tuple[str, tuple[float, ...], float]] = []
            for question in QUESTIONS:
                answer = await opened.answerer.answer(
                    Conversation.from_turns(("user", question)), Sampling(max_tokens=16, logprobs=True)
                )
                score = await opened.answerer.score(
                    Conversation.from_turns(("user", question), ("assistant", "It is 6."))
                )
                results.append((answer.text, answer.completions[0].logprobs or (), score.nll))
            return results

    return asyncio.run(work())


def test_an_adapter_answers_as_the_merged_model_does(adapter: Path, finished_run: Path, tiny_folder: Path) -> None:
    unmerged, merged, base = map(answer_and_score, (adapter, finished_run, tiny_folder))
    for one, other in zip(unmerged, merged, strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=2e-3)
        assert one[2] == pytest.approx(other[2], abs=2e-3)
    assert [nll for _, _, nll in unmerged] != pytest.approx([nll for _, _, nll in base], abs=0.1), "it was trained"


def test_chat_and_serve_accept_an_adapter(adapter: Path, finished_run: Path) -> None:
    options = ("--max-tokens", 8, "--temperature", 0)
    chats = [corral("chat", model, *options, input=f"{QUESTIONS[3]}\n") for model in (adapter, finished_run)]
    assert [chat.returncode for chat in chats] == [0, 0], chats[0].stderr
    assert chats[0].stdout == chats[1].stdout
    with serving(adapter) as (output, _):
        body = {"messages": [{"role": "user", "content": QUESTIONS[3]}], "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"{address(output)}/v1/chat/completions",
            json.dumps({"model": "tiny-train-1-sft", **body}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            text = json.load(response)["choices"][0]["message"]["content"]
    printable = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "", text)  # chat removes control characters from answers
    assert printable.strip()
    assert printable in chats[0].stdout


def test_merging_the_adapter_gives_the_runs_own_model(adapter: Path, finished_run: Path, tmp_path: Path) -> None:
    done = corral("merge", adapter, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["merged"] == str(tmp_path / "out")
    own, merged = finished_run / "train-1-sft" / "merged", tmp_path / "out"
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (merged / name).read_bytes() == (own / name).read_bytes(), name
    again = corral("merge", adapter, "--out", tmp_path / "out")
    assert again.returncode == 2
    assert "not empty" in again.stderr


def test_a_recipe_that_names_an_adapter_trains_it_further(
    adapter: Path, finished_run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    write_workspace(tmp_path, tiny_folder)
    recipe = tmp_path / "r.toml"
    recipe.write_text(recipe.read_text().replace("[data]", f'adapter = "{adapter}"\n[data]', 1))
    refused = corral("run", recipe, "--out", tmp_path / "run")
    assert refused.returncode == 2
    assert "remove `train.0.lora`" in refused.stderr
    recipe.write_text(recipe.read_text().replace("[train.lora]\nrank = 4\n", ""))
    small = ("--set", "train.0.optimizer.lr=1e-30", "--set", "train.0.steps=2", "--set", "name=further")
    done = corral("run", recipe, "--out", tmp_path / "run", *small)
    assert done.returncode == 0, done.stderr
    assert "is trained further; its base stays frozen" in done.stderr
    own, further = (run / "train-1-sft" for run in (finished_run, tmp_path / "run"))
    best = json.loads((own / "outcome.json").read_text())["best_loss"]
    first = json.loads((further / "metrics.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] == pytest.approx(best, rel=1e-6), "it begins where the other run ended"
    for file in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert (further / file).read_bytes() == (own / file).read_bytes(), "no step is that small"
    answers = [answer_and_score(model) for model in (further / "adapter", tmp_path / "run")]
    assert [a[0] for a in answers[0]] == [a[0] for a in answers[1]]


def test_an_adapter_in_a_run_is_used_with_its_own_template_whatever_the_recipe_names(
    adapter: Path, finished_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace('template = "tokenizer"', 'template = "gone.jinja"'))
    here, there = (find_model_files(str(path)).load_template() for path in (adapter, run / "train-1-sft" / "adapter"))
    assert there.digest == here.digest
