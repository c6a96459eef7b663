from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from corral.answering.identity import AnswerIdentity
from corral.data.plain_text import PlainTextEncoder
from corral.engines.base import Sampling
from corral.engines.embedding import Embedder
from corral.engines.scripted import ScriptedEngine
from corral.errors import EngineError, RequestError
from corral.evaluation.evaluation_data import EvaluationData
from corral.evaluation.inference import Item, RankedAnswers, TextItem
from corral.evaluation.measurements import Measurements, VariantSpec
from corral.evaluation.question_sets import Question
from corral.evaluation.scorecard import build_scorecard
from corral.evaluation.scoring import score_rows
from corral.evaluation.tasks import sample_task
from corral.messages import Conversation, with_input
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
    return EvaluationData(ROWS[:rows], (), ROWS[:rows], [sample_task("mmlu", SET, questions, seed=0)], lambda: EXAMPLES)


MODEL = AnswerIdentity("model", "template", "tokenizer", "scripted", "float32", "cpu")


def spec(name: str = "tuned", settings: Answer = PLAIN, *, with_loss: bool = True, **changes: Any) -> VariantSpec:
    identity = MODEL.asked(settings, 0, "examples" if settings.shots.count else "")
    return VariantSpec(name, replace(identity, **changes), with_loss)


class CountingEngine(ScriptedEngine):
    """Answers A to everything, counts its calls, and fails after `fails_after` answers."""

    def __init__(self, template: Template, fails_after: int | None = None) -> None:
        self.answered, self.scored = 0, 0
        (token,) = template.tokenizer.encode("A", add_special_tokens=False)

        def reply(ids: Sequence[int], sampling: Sampling, choice: int) -> Iterator[int]:
            self.answered += 1
            fails = fails_after is not None and self.answered > fails_after
            yield token
            if fails:  # the others have finished by then
                yield from (token, token)
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
    reuse: Path | None = None,
) -> tuple[int, int]:
    """Measure variants, after a reuse of rows from another folder. Returns: numbers of answers and of scores."""
    data = data or dataset()

    async def run() -> tuple[int, int]:
        async with CountingEngine(template, fails_after) as engine:
            measurements = Measurements(folder)
            if reuse:
                measurements.reuse_rows(reuse, variants, data)
            for variant in variants:
                await measurements.measure(variant, engine, template, data, Progress())
                assert measurements.is_complete(variant, data)
            return engine.answered, engine.scored

    return asyncio.run(run())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def json_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def prompt_tokens(folder: Path, name: str, variant: str) -> dict[str, int]:
    return {row["id"]: row["prompt_tokens"] for row in json_rows(folder, name) if row["variant"] == variant}


def test_a_variant_is_measured_on_everything_and_its_rows_say_so(template: Template, tmp_path: Path) -> None:
    assert measure(tmp_path, template, spec()) == (5 + 4, 5 + 2 * 4)
    files = {"completions.jsonl", "losses.jsonl", "seconds.jsonl", "tasks/mmlu.jsonl", "tasks/mmlu.options.jsonl"}
    assert contents(tmp_path).keys() == files
    rows = Measurements(tmp_path).variant_rows("tuned")
    assert len(rows.rows) == 5
    assert all(row.nll is not None and row.answer is not None for row in rows.rows)
    assert len(rows.tasks["mmlu"]) == 4
    assert all(row.correct.keys() == {"accuracy", "logprob", "logprob_byte"} for row in rows.tasks["mmlu"])
    questions = sample_task("mmlu", SET, 4, seed=0).questions
    correct = {row.id: row.correct["accuracy"] for row in rows.tasks["mmlu"]}
    assert correct == {question.id: question.correct_option == 0 for question in questions}
    assert (rows.info["answers"], rows.info["mmlu/answers"]) == (5, 4)
    assert rows.info["answers_per_second"] == pytest.approx(5 / rows.info["seconds"])


def test_ranked_answers_are_scored_once_each_and_belong_to_the_model(template: Template, tmp_path: Path) -> None:
    prompt = Conversation.from_turns(("user", "say 1"))
    ranked = RankedAnswers("ranked", prompt, ("A", "it is one", "one"), ((0, 1), (0, 2), (2, 1)))
    data = EvaluationData(ranked_answers=[ranked])
    assert measure(tmp_path, template, spec(), spec("shots", SHOTS, with_loss=False), data=data) == (0, 3)
    (row,) = json_rows(tmp_path, "preferences.jsonl")
    assert row["tokens"][1] > row["tokens"][0], "all tokens of the answer count, and nothing of the prompt"
    (measured,) = Measurements(tmp_path).variant_rows("tuned").rows
    assert measured.ranked is not None
    expected = sum(row["logprobs"][b] - row["logprobs"][w] for b, w in ranked.pairs)
    assert (measured.ranked.pairs, measured.ranked.margin) == (3, pytest.approx(expected))
    assert measure(tmp_path, template, spec(), data=data) == (0, 0)
    long = replace(ranked, id="long", answers=("A", "one", "word " * 9000))
    measure(tmp_path, template, spec(), data=EvaluationData(ranked_answers=[ranked, long]))
    skipped = {row.id: row.skipped for row in Measurements(tmp_path).variant_rows("tuned").rows}
    assert "exceed" in skipped["long"]["preferences"]
    assert not skipped["ranked"]


def test_measuring_again_asks_nothing_and_changes_nothing(template: Template, tmp_path: Path) -> None:
    measure(tmp_path, template, spec())
    before = contents(tmp_path)
    assert measure(tmp_path, template, spec()) == (0, 0)
    assert contents(tmp_path) == before


def test_a_stopped_evaluation_continues_without_repeating_a_row(template: Template, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="stopped on purpose"):
        measure(tmp_path, template, spec(), fails_after=3)
    before = contents(tmp_path)
    finished = before["completions.jsonl"].count(b"\n")
    assert 0 < finished < 5
    assert measure(tmp_path, template, spec())[0] == 5 - finished + 4
    after = contents(tmp_path)
    assert all(after[name].startswith(before[name]) for name in before)
    assert {row.id for row in Measurements(tmp_path).variant_rows("tuned").rows} == {item.id for item in ROWS}


def test_a_new_variant_keeps_the_rows_of_the_others_byte_for_byte(template: Template, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    measure(old, template, spec("base"), spec())
    variants = [spec("base"), spec(), spec("shots", SHOTS, with_loss=False)]
    Measurements(new).reuse_rows(old, variants, dataset())
    assert contents(new) == contents(old)
    assert measure(new, template, *variants) == (5 + 4, 2 * 4)
    assert all(contents(new)[name].startswith(before) for name, before in contents(old).items())
    assert b"shots" not in contents(new)["losses.jsonl"]


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        ({"settings": Answer(max_tokens=7)}, (9, 0)),
        ({"settings": SHOTS}, (9, 8)),
        ({"settings": Answer(max_tokens=6, top_p=0.5), "seed": 1}, (0, 0)),
        ({"weights": "another model"}, (9, 13)),
        ({"engine": "vllm"}, (9, 13)),
        ({"dtype": "bfloat16"}, (9, 13)),
        ({"device": "cuda", "version": "0.0.0"}, (0, 0)),
        ({"settings": Answer.model_validate({"max_tokens": 6, "reasoning": True})}, (9, 0)),
        ({"with_loss": False}, (0, 0)),
    ],
)
def test_a_changed_variant_is_measured_again_as_far_as_it_changed(
    template: Template, tmp_path: Path, change: dict[str, Any], measured: tuple[int, int]
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    measure(old, template, spec("base"), spec())
    assert measure(new, template, spec("base"), spec(**change), reuse=old) == measured


def test_fewer_rows_are_reused_with_their_share_of_the_time(template: Template, tmp_path: Path) -> None:
    measure(tmp_path / "old", template, spec())
    assert measure(tmp_path / "new", template, spec(), data=dataset(2, 3), reuse=tmp_path / "old") == (0, 0)
    rows, all_rows = (Measurements(tmp_path / name).variant_rows("tuned") for name in ("new", "old"))
    assert [row.id for row in rows.rows] == ["row-0", "row-1"]
    assert rows.info["seconds"] == pytest.approx(all_rows.info["seconds"] * 2 / 5)
    assert rows.info["answers_per_second"] == pytest.approx(all_rows.info["answers_per_second"])


def test_examples_come_from_the_run_and_from_questions_that_are_not_asked(template: Template, tmp_path: Path) -> None:
    old, variants = tmp_path / "old", (spec("plain"), spec("shots", SHOTS))
    measure(old, template, *variants)
    for name in ("completions.jsonl", "tasks/mmlu.jsonl"):
        plain, shots = (prompt_tokens(old, name, variant) for variant in ("plain", "shots"))
        assert plain.keys() == shots.keys()
        assert all(shots[id_] > plain[id_] + 10 for id_ in plain)
    # Other examples change only the answers that are asked with examples of the run.
    changed = (spec("plain"), spec("shots", SHOTS, examples="other"))
    assert measure(tmp_path / "new", template, *changed, reuse=old) == (5, 0)


def test_examples_of_a_source_change_the_answers_and_not_those_of_a_task(template: Template, tmp_path: Path) -> None:
    old, source = tmp_path / "old", tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"{n}? " * 40, "completion": str(n)}) + "\n" for n in range(9)))
    named = Answer.model_validate({"max_tokens": 6, "shots": {"count": 2, "source": {"path": str(source)}}})
    measure(old, template, spec("own", SHOTS), spec("named", named, examples="before"))
    answers, task = (
        {variant: next(iter(prompt_tokens(old, name, variant).values())) for variant in ("own", "named")}
        for name in ("completions.jsonl", "tasks/mmlu.jsonl")
    )
    assert answers["named"] > 2 * answers["own"]
    assert task["named"] == task["own"]
    changed = [spec("own", SHOTS), spec("named", named, examples="after")]
    assert measure(tmp_path / "new", template, *changed, reuse=old) == (5, 0)


def test_an_evaluation_that_was_stopped_and_went_on_with_other_engines_has_rows_of_the_last_one_only(
    template: Template, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match="stopped on purpose"):
        measure(tmp_path, template, spec(), fails_after=3)
    measure(tmp_path, template, spec(engine="vllm"))
    measure(tmp_path, template, spec())
    measurements = Measurements(tmp_path)
    measurements.finish([spec()], dataset())
    for folder in (measurements, Measurements(tmp_path)):
        assert len(folder.variant_rows("tuned").rows) == 5
    for name in contents(tmp_path):
        rows = json_rows(tmp_path, name)
        producers = [(row["made"], row["id"]) for row in rows]
        assert len(producers) == len(set(producers)) == (2 if name == "seconds.jsonl" else 4 if "mmlu" in name else 5)
        assert {row["made"] for row in rows} <= {row["made"] for row in json_rows(tmp_path, "seconds.jsonl")} | {
            spec().identity.scoring().digest,
            *(row["made"] for row in json_rows(tmp_path, "tasks/mmlu.options.jsonl")),
        }


LONG = Conversation.from_turns(("user", "word " * 9000), ("assistant", "so"))


def test_a_set_of_which_every_row_is_refused_is_recorded_if_another_can_be_measured(
    template: Template, tmp_path: Path
) -> None:
    data = replace(dataset(), answer_items=[Item("a", LONG), Item("b", LONG)])
    assert measure(tmp_path, template, spec(), data=data) == (4, 5 + 2 * 4)
    rows = {row.id: row.skipped for row in Measurements(tmp_path).variant_rows("tuned").rows if row.skipped}
    assert rows.keys() == {"a", "b"}
    assert "exceed" in rows["a"]["answers"]
    assert measure(tmp_path, template, spec(), data=data) == (0, 0), "skipped rows are not asked again"


def test_if_every_row_of_every_set_is_refused_the_error_names_variant_set_and_reason(
    template: Template, tmp_path: Path
) -> None:
    data = EvaluationData(loss_items=[Item("a", LONG)], answer_items=[Item("a", LONG), Item("b", LONG)])
    with pytest.raises(RequestError, match="exceed") as refused:
        measure(tmp_path, template, spec(), data=data)
    assert "variant tuned, held-out loss, all 1 rows" in (refused.value.where or "")
    assert not contents(tmp_path), "after a correction they are asked again"


def test_documents_are_measured_by_loss_and_their_windows_are_one_row(template: Template, tmp_path: Path) -> None:
    whole = PlainTextEncoder(template).encode("Größe ist relativ. ")
    items = [TextItem(f"{i}", "Größe", whole, 7, "one" if i < 2 else "another") for i in range(3)]
    data = EvaluationData(loss_items=items)
    variants = [spec(), spec("shots", SHOTS, with_loss=False)]
    assert measure(tmp_path, template, *variants, data=data) == (0, 3)
    measurements = Measurements(tmp_path)
    measurements.finish(variants, data)
    rows = measurements.variant_rows("tuned")
    assert rows.has_texts
    assert {(row.kind, row.id, row.bytes) for row in rows.rows} == {("text", "one", 14), ("text", "another", 7)}
    card = build_scorecard({"tuned": rows, "shots": measurements.variant_rows("shots")}, baseline="tuned")
    assert {name: value.n for name, value in card.variants["tuned"].metrics.items()} == {"loss": 2, "bits_per_byte": 2}


class LoggingEmbedder(Embedder):
    """Returns vectors without a meaning, and logs how many texts it was given."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        self._events.append(f"embeds {len(texts)}")
        return np.ones((len(texts), 4)) / 2


def test_what_is_loaded_and_embedded_once_is_not_part_of_the_time(
    template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    clock = itertools.count()

    def read_clock() -> float:
        events.append("reads the clock")
        return float(next(clock))

    monkeypatch.setattr("corral.evaluation.measurements.time.perf_counter", read_clock)
    measurements = Measurements(tmp_path, LoggingEmbedder(events))

    async def measured_twice(name: str, settings: dict[str, Any]) -> list[list[str]]:
        logs: list[list[str]] = []
        variant = spec(name, Answer.model_validate(settings))
        async with CountingEngine(template) as engine:
            for _ in range(2):
                events.clear()
                await measurements.measure(variant, engine, template, dataset(), Progress())
                logs.append(list(events))
        return logs

    first, second = asyncio.run(measured_twice("similar", {"shots": {"count": 2, "choose": "similar"}}))
    assert first[:3] == [f"embeds {len(EXAMPLES)}", "embeds 1", "reads the clock"]
    # The rows of the run, and the two ways to ask a task.
    assert sum(event in ("embeds 8", "embeds 10") for event in first) == 3
    assert second == [], "nothing is loaded or timed for finished rows"
    first, second = asyncio.run(measured_twice("vote", {"consensus": {"method": "cosine", "n": 2, "stop": "never"}}))
    assert first[:2] == ["embeds 1", "reads the clock"]
    assert second == []


def test_a_vote_records_how_many_candidates_it_did_not_need(template: Template, tmp_path: Path) -> None:
    vote = Answer.model_validate({"max_tokens": 6, "consensus": {"method": "rouge-l", "n": 5, "stop": "lossless"}})
    measure(tmp_path, template, spec("plain"), spec("vote", vote))
    finishes = [finish for row in json_rows(tmp_path, "completions.jsonl") for finish in row.get("finishes", [])]
    info = Measurements(tmp_path).variant_rows("vote").info
    assert (info["candidates"], info["cancelled"]) == (25, finishes.count("cancelled"))
    assert info["mmlu/candidates"] == 20
    assert "candidates" not in Measurements(tmp_path).variant_rows("plain").info


def test_an_overlong_row_is_counted_as_measured_and_kept_out_of_scores_and_costs(
    template: Template, tmp_path: Path
) -> None:
    long = Item("long", Conversation.from_turns(("user", with_input("why?", "word " * 9000)), ("assistant", "so")))
    shared = [
        Item(f"q{i}", Conversation.from_turns(("user", with_input(f"{i}?", "x")), ("assistant", "é"))) for i in (1, 2)
    ]
    data = replace(dataset(), loss_items=[*ROWS, long, *shared], answer_items=[*ROWS, long, *shared])
    measure(tmp_path, template, spec(), data=data)
    measurements = Measurements(tmp_path)
    measurements.finish([spec()], data)
    rows = {row.id: row for row in measurements.variant_rows("tuned").rows}
    assert rows["long"].skipped.keys() == {"loss", "answers"}
    assert (rows["long"].nll, rows["long"].answer) == (None, None)
    assert measurements.variant_rows("tuned").info["answers"] == 7
    assert (rows["q1"].bytes, rows["row-0"].passage) == (2, None)
    assert rows["q1"].passage == rows["q2"].passage != rows["long"].passage
    columns = score_rows("tuned", list(rows.values()))
    assert (len(columns["loss"].ids), len(columns["loss"].clustered)) == (7, 6)
    card = build_scorecard({"tuned": measurements.variant_rows("tuned")}, baseline="tuned")
    assert sum("1 of 8 rows of the test rows have no score" in caution for caution in card.cautions) == 2
