from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from corral.engines.base import Sampling
from corral.engines.embedding import Embedder
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError
from corral.evaluation import measurements
from corral.evaluation.inference import Item
from corral.evaluation.measurements import EvaluationData, Measurements, VariantSpec
from corral.evaluation.question_sets import Question
from corral.evaluation.tasks import sample_task
from corral.messages import Conversation
from corral.progress import Progress
from corral.recipe import Answer
from corral.template import Template

ROWS = [Item(f"row-{i}", Conversation.from_turns(("user", f"say {i}"), ("assistant", f"it is {i}"))) for i in range(5)]
SET = [
    Question(
        f"Is {i} even?\nA. yes\nB. no",
        "A. yes" if i % 2 == 0 else "B. no",
        ("no" if i % 2 else "yes",),
        ("yes", "no"),
        "?",
    )
    for i in range(12)
]
EXAMPLES = [Conversation.from_turns(("user", f"say {i}"), ("assistant", "so")) for i in range(20, 30)]
PLAIN = Answer(max_tokens=6)
SHOTS = Answer.model_validate({"max_tokens": 6, "shots": {"count": 2}})


def dataset(rows: int = 5, questions: int = 4) -> EvaluationData:
    return EvaluationData(
        ROWS[:rows], ROWS[:rows], [sample_task("mmlu", SET, questions, seed=0)], lambda: EXAMPLES, "examples"
    )


def spec(name: str = "tuned", settings: Answer = PLAIN, **changes: Any) -> VariantSpec:
    return replace(VariantSpec(name, "model", settings, seed=0), **changes)


class Engine(ScriptedEngine):
    """Says A to everything; counts what it is asked, and fails once it was asked for `fails_after` answers."""

    def __init__(self, template: Template, fails_after: int | None = None) -> None:
        self.asked, self.scored = 0, 0
        (said,) = template.tokenizer.encode("A", add_special_tokens=False)

        def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
            self.asked += 1
            late = fails_after is not None and self.asked > fails_after
            yield said
            if late:  # the others are done by then
                yield from (said, said)
                raise RuntimeError("stopped on purpose")

        super().__init__(reply)

    async def score(self, ids: Sequence[int], start: int = 1) -> list[float]:
        self.scored += 1
        return await super().score(ids, start)


def measure(
    folder: Path,
    template: Template,
    *variants: VariantSpec,
    data: EvaluationData | None = None,
    fails_after: int | None = None,
) -> Engine:
    async def go() -> Engine:
        async with Engine(template, fails_after) as engine:
            measurements = Measurements(folder)
            for variant in variants:
                await measurements.measure(variant, engine, template, data or dataset(), Progress())
                assert measurements.is_complete(variant, data or dataset())
            return engine

    return asyncio.run(go())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def test_a_variant_is_measured_by_all_there_is_and_its_rows_say_so(template: Template, tmp_path: Path) -> None:
    engine = measure(tmp_path, template, spec())
    files = {"completions.jsonl", "losses.jsonl", "seconds.jsonl", "tasks/mmlu.jsonl", "tasks/mmlu.options.jsonl"}
    assert contents(tmp_path).keys() == files
    assert (engine.asked, engine.scored) == (5 + 4, 5 + 2 * 4)
    rows = Measurements(tmp_path).variant_rows("tuned")
    assert len(rows.rows) == 5
    assert all(row.nll is not None and row.answer is not None for row in rows.rows)
    assert len(rows.tasks["mmlu"]) == 4
    assert all(row.correct.keys() == {"accuracy", "logprob", "logprob_byte"} for row in rows.tasks["mmlu"])
    asked = sample_task("mmlu", SET, 4, seed=0).questions
    assert {row.id: row.correct["accuracy"] for row in rows.tasks["mmlu"]} == {
        q.id: q.correct_option == 0 for q in asked
    }
    assert rows.info["answers"] == 5
    assert rows.info["mmlu/answers"] == 4
    assert rows.info["answers_per_second"] == pytest.approx(5 / rows.info["seconds"])


def test_measuring_again_asks_nothing_and_changes_nothing(template: Template, tmp_path: Path) -> None:
    measure(tmp_path, template, spec())
    before = contents(tmp_path)
    engine = measure(tmp_path, template, spec())
    assert (engine.asked, engine.scored) == (0, 0)
    assert contents(tmp_path) == before


def test_what_was_stopped_goes_on_without_doing_anything_twice(template: Template, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="stopped on purpose"):
        measure(tmp_path, template, spec(), fails_after=3)
    before = contents(tmp_path)
    done = before["completions.jsonl"].count(b"\n")
    assert 0 < done < 5
    engine = measure(tmp_path, template, spec())
    assert engine.asked == 5 - done + 4
    after = contents(tmp_path)
    assert all(after[name].startswith(before[name]) for name in before)
    assert len(Measurements(tmp_path).variant_rows("tuned").rows) == 5


def test_another_variant_keeps_the_rows_of_those_there_are_byte_for_byte(template: Template, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    measure(old, template, spec("base"), spec())
    every = [spec("base"), spec(), spec("shots", SHOTS, with_loss=False)]
    Measurements(new).reuse_rows(old, every, dataset())
    assert contents(new) == contents(old)
    engine = measure(new, template, *every)
    assert (engine.asked, engine.scored) == (5 + 4, 2 * 4)
    assert all(contents(new)[name].startswith(before) for name, before in contents(old).items())
    assert b"shots" not in contents(new)["losses.jsonl"]


@pytest.mark.parametrize(
    ("change", "answers", "scores"),
    [
        ({"settings": Answer(max_tokens=7)}, 9, 8),
        ({"seed": 1}, 9, 8),
        ({"model_identity": "another model"}, 9, 13),
        ({"settings": Answer.model_validate({"max_tokens": 6, "reasoning": True})}, 9, 0),
        ({"with_loss": False}, 0, 0),
    ],
)
def test_a_variant_that_changes_is_measured_anew_as_far_as_it_changed(
    template: Template, tmp_path: Path, change: dict[str, Any], answers: int, scores: int
) -> None:
    measure(tmp_path / "old", template, spec("base"), spec())
    changed = [spec("base"), spec(**change)]
    Measurements(tmp_path / "new").reuse_rows(tmp_path / "old", changed, dataset())
    engine = measure(tmp_path / "new", template, *changed)
    assert (engine.asked, engine.scored) == (answers, scores)


def test_fewer_rows_are_taken_over_with_their_part_of_the_time(template: Template, tmp_path: Path) -> None:
    measure(tmp_path / "old", template, spec())
    fewer = dataset(rows=2, questions=3)
    new = Measurements(tmp_path / "new")
    new.reuse_rows(tmp_path / "old", [spec()], fewer)
    assert new.is_complete(spec(), fewer)
    rows, all_rows = new.variant_rows("tuned"), Measurements(tmp_path / "old").variant_rows("tuned")
    assert [row.id for row in rows.rows] == ["row-0", "row-1"]
    assert rows.info["seconds"] == pytest.approx(all_rows.info["seconds"] * 2 / 5)
    assert rows.info["answers_per_second"] == pytest.approx(all_rows.info["answers_per_second"])


def test_examples_come_from_the_run_and_from_questions_that_are_not_asked(template: Template, tmp_path: Path) -> None:
    measure(tmp_path, template, spec("plain"), spec("shots", SHOTS))
    counted = {
        name: [json.loads(line) for line in contents(tmp_path)[name].splitlines()]
        for name in ("completions.jsonl", "tasks/mmlu.jsonl")
    }
    for rows in counted.values():
        of = {
            variant: {r["id"]: r["prompt_tokens"] for r in rows if r["variant"] == variant}
            for variant in ("plain", "shots")
        }
        assert of["plain"].keys() == of["shots"].keys()
        assert all(of["shots"][id_] > of["plain"][id_] + 10 for id_ in of["plain"])


def test_other_examples_are_other_answers_only_where_examples_are_shown(template: Template, tmp_path: Path) -> None:
    every = [spec("plain"), spec("shots", SHOTS)]
    measure(tmp_path / "old", template, *every)
    other = replace(dataset(), examples_identity=hashlib.sha256(b"other").hexdigest())
    new = Measurements(tmp_path / "new")
    new.reuse_rows(tmp_path / "old", every, other)
    engine = measure(tmp_path / "new", template, *every, data=other)
    assert engine.asked == 5


def test_other_rows_of_a_source_are_other_answers_and_a_task_keeps_examples_of_its_own(
    template: Template, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}? " * 40, "completion": str(n)}) + "\n" for n in range(9)))
    named = Answer.model_validate({"max_tokens": 6, "shots": {"count": 2, "source": {"path": str(rows)}}})
    before = [spec("own", SHOTS), spec("named", named, examples_identity="before")]
    measure(tmp_path / "old", template, *before)
    of = {
        (name, row["variant"]): row["prompt_tokens"]
        for name in ("completions.jsonl", "tasks/mmlu.jsonl")
        for row in map(json.loads, contents(tmp_path / "old")[name].splitlines())
    }
    assert of["completions.jsonl", "named"] > 2 * of["completions.jsonl", "own"]
    assert of["tasks/mmlu.jsonl", "named"] == of["tasks/mmlu.jsonl", "own"]
    after = [spec("own", SHOTS), spec("named", named, examples_identity="after")]
    new = Measurements(tmp_path / "new")
    new.reuse_rows(tmp_path / "old", after, dataset())
    engine = measure(tmp_path / "new", template, *after)
    assert (engine.asked, engine.scored) == (5, 0)


class Watched(Embedder):
    """Vectors without a meaning; writes down how many texts it is given."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        self._events.append(f"embeds {len(texts)}")
        return np.ones((len(texts), 4)) / 2


def test_what_is_loaded_and_embedded_once_is_no_part_of_the_time(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    clock = itertools.count()

    def tell() -> float:
        events.append("looks at the clock")
        return float(next(clock))

    monkeypatch.setattr(measurements.time, "perf_counter", tell)
    similar = Answer.model_validate({"shots": {"count": 2, "choose": "similar"}})
    vote = Answer.model_validate({"consensus": {"method": "cosine", "n": 2, "stop": "never"}})
    into = Measurements(tmp_path, Watched(events))

    async def go() -> None:
        async with Engine(template) as engine:
            for name, settings in (("similar", similar), ("vote", vote)):
                for _ in range(2):
                    events.clear()
                    await into.measure(spec(name, settings), engine, template, dataset(), Progress())
                    told[name].append(list(events))

    told: dict[str, list[list[str]]] = {"similar": [], "vote": []}
    asyncio.run(go())
    (similar_once, similar_again), (vote_once, vote_again) = told.values()
    assert similar_once[:3] == [f"embeds {len(EXAMPLES)}", "embeds 1", "looks at the clock"]
    # Of the rows, and of the two ways to ask a task.
    assert sum(event in ("embeds 8", "embeds 10") for event in similar_once) == 3
    assert vote_once[:2] == ["embeds 1", "looks at the clock"]
    assert similar_again == vote_again == [], "what is there is neither loaded for nor timed"


def test_a_vote_tells_how_many_candidates_it_did_not_need(template: Template, tmp_path: Path) -> None:
    vote = Answer.model_validate({"max_tokens": 6, "consensus": {"method": "rouge-l", "n": 5, "stop": "lossless"}})
    measure(tmp_path, template, spec("plain"), spec("vote", vote))
    rows = [json.loads(line) for line in contents(tmp_path)["completions.jsonl"].splitlines()]
    finishes = [finish for row in rows for finish in row.get("finishes", [])]
    info = Measurements(tmp_path).variant_rows("vote").info
    assert (info["candidates"], info["cancelled"]) == (25, finishes.count("cancelled"))
    assert info["mmlu/candidates"] == 20
    assert "candidates" not in Measurements(tmp_path).variant_rows("plain").info
