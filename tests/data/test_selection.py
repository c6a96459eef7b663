"""Each step on the plans of real rows; `prepare` as a whole is tested in test_prepare and test_prepare_mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corral.data import selection
from corral.data.ledger import FATES, FATES_WITH_REASON, USED_FATES
from corral.data.mixture import SIDES
from corral.data.selection import UNSET, SourcePlan
from corral.data.worker_pool import WorkerPool
from corral.progress import Progress
from corral.recipe import Data, Split
from corral.template import Template
from tests.data.conftest import Listener, chat, chats, dialogue, prose, source, write_rows

Planned = Callable[..., list[SourcePlan]]
TRAIN, VALIDATION, TEST = range(3)


def data_of(plans: list[SourcePlan], **settings: Any) -> Data:
    return Data(sources=tuple(plan.source for plan in plans), **settings)


def fates(plan: SourcePlan) -> list[str]:
    return [FATES[number] if number != UNSET else "open" for number in plan.fate]


def reasons(plan: SourcePlan) -> list[str | None]:
    return [plan.reasons[number] if number != UNSET else None for number in plan.reason]


def chosen(plans: list[SourcePlan], **settings: Any) -> list[list[str]]:
    selection.deduplicate_and_cap(plans, data_of(plans, **settings), 0, WorkerPool(Progress(), 1))
    return [fates(plan) for plan in plans]


# ---- chosen


def test_the_first_of_equal_rows_is_chosen_and_the_others_are_copies(planned: Planned, tmp_path: Path) -> None:
    one, two, three = chat(prose(1), prose(2)), chat(prose(3), prose(4)), chat(prose(5), prose(6))
    nearly_one = chat(prose(1), prose(2) + " indeed")
    a = source(write_rows(tmp_path / "a.jsonl", [one, two, one, nearly_one]))
    b = source(write_rows(tmp_path / "b.jsonl", [three, two, nearly_one, one]))
    for duplicates, expected in {
        "exact": [["open", "open", "duplicate", "open"], ["open", "duplicate", "duplicate", "duplicate"]],
        # An exact copy of a near copy is a copy like any other.
        "near": [
            ["open", "open", "duplicate", "near duplicate"],
            ["open", "duplicate", "duplicate", "duplicate"],
        ],
        "keep": [["open"] * 4, ["open"] * 4],
    }.items():
        assert chosen(planned(a, b), duplicates=duplicates) == expected, duplicates
    assert chosen(planned(b, a), duplicates="near")[0] == ["open", "open", "open", "near duplicate"]


def test_copies_do_not_count_towards_a_cap(planned: Planned, tmp_path: Path) -> None:
    a = source(write_rows(tmp_path / "a.jsonl", chats(10) * 2), rows=7)
    b = source(write_rows(tmp_path / "b.jsonl", chats(10)))
    plans = planned(a, b)
    first, second = chosen(plans)
    assert (first[:10].count("open"), first[:10].count("not sampled")) == (7, 3)
    assert first[10:] == ["duplicate"] * 10
    assert {why for fate, why in zip(first, reasons(plans[0]), strict=True) if fate == "not sampled"} == {
        "beyond the cap of 7 rows"
    }
    # What a cap left out of one source is no copy in the next.
    assert [fate == "open" for fate in second] == [fate == "not sampled" for fate in first[:10]]


# ---- encoded and judged


@pytest.fixture
def judged(planned: Planned, template: Template, tmp_path: Path) -> Callable[..., SourcePlan]:
    """`judged(rows, max_length=…, …)`: all of these rows chosen and encoded."""

    def judge(rows: Iterable[Any], **settings: Any) -> SourcePlan:
        path = write_rows(tmp_path / "judged.jsonl", rows)
        plans = planned(source(path), **settings)
        selection.encode_selected(plans, data_of(plans, **settings), template, WorkerPool(Progress(), 1))
        return plans[0]

    return judge


def test_a_row_is_overlong_from_the_first_token_beyond_the_limit(
    judged: Callable[..., SourcePlan], template: Template
) -> None:
    row = chat("Why?", "Because it is so.")
    whole = judged([row], max_length=1000)
    length = int(whole.tokens[0])
    assert fates(whole) == ["kept"]
    assert fates(judged([row], max_length=length)) == ["kept"]
    dropped = judged([row], max_length=length - 1)
    assert (fates(dropped), reasons(dropped)) == (["dropped"], [f"longer than {length - 1} tokens"])
    # Behind the end of the answer the template has a line break, which is not trained: nothing trained is lost with it.
    cut = [judged([row], max_length=length - n, overlong="truncate") for n in (1, 2)]
    assert [fates(plan) for plan in cut] == [["truncated"], ["truncated"]]
    assert [bool(plan.lost_end[0]) for plan in cut] == [False, True]
    trained = int(whole.trained_tokens[0])
    assert [int(plan.trained_tokens[0]) for plan in cut] == [trained, trained - 1]
    assert all(int(plan.tokens[0]) == length for plan in cut), "the length is that before the cut"


def test_each_untrainable_row_has_its_fate_reason_and_token_counts(judged: Callable[..., SourcePlan]) -> None:
    rows = [chat("Hi?", "Yes."), chat("long " * 60, "Yes."), chat("Hi?", "yes " * 60), chat("no character \ufdd0", "x")]
    cut = judged(rows, max_length=60, overlong="truncate")
    assert fates(cut) == ["kept", "fully masked", "truncated", "dropped"]
    assert reasons(cut)[1] == "fully masked: none of the first 60 tokens is trained"
    assert reasons(cut)[3] == "the text contains U+FDD0, which is not a character"
    assert cut.lost_end.tolist() == [False, True, True, False]
    assert cut.trained_tokens.tolist()[1] == 0
    assert (cut.tokens[3], cut.trained_tokens[3]) == (UNSET, UNSET)
    dropped = judged(rows, max_length=60, overlong="drop")
    assert fates(dropped) == ["kept", "dropped", "dropped", "dropped"]
    assert reasons(dropped)[1] == reasons(dropped)[2] == "longer than 60 tokens"
    assert not dropped.lost_end.any(), "what is dropped whole has lost no end"
    assert (dropped.tokens[1:3] > 60).all()


def test_reasons_of_a_template_are_as_many_as_are_kept(
    planned: Planned, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "MAX_REASONS", 5)
    refuse = "{% if 'plus' in messages[0].content %}{{ raise_exception(messages[0].content) }}{% endif %}"
    answers = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
    answers += "{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    template = Template(tiny_tokenizer, refuse + answers, "refusing")
    (plan,) = plans = planned(source(write_rows(tmp_path / "a.jsonl", chats(20))))
    selection.encode_selected(plans, data_of(plans), template, WorkerPool(Progress(), 1))
    assert fates(plan) == ["dropped"] * 20
    counts = {reason: reasons(plan).count(reason) for reason in plan.reasons}
    assert sorted(counts.values()) == [1, 1, 1, 1, 1, 15]
    assert counts["other reasons"] == 15


def test_a_pair_is_truncated_if_an_answer_is_cut_and_fully_masked_if_the_prompt_fills_it(
    judged: Callable[..., SourcePlan],
) -> None:
    asked = [{"role": "user", "content": "Hi?"}]
    more = [*asked, {"role": "assistant", "content": "long " * 40}, asked[0]]

    def pair(prompt: list[dict[str, str]], rejected: str) -> dict[str, Any]:
        chosen, other = ([{"role": "assistant", "content": text}] for text in ("Yes.", rejected))
        return {"prompt": prompt, "chosen": chosen, "rejected": other}

    rows = [pair(asked, "No."), pair(asked, "no " * 60), pair(more, "No.")]
    plan = judged(rows, max_length=100, overlong="truncate")
    assert fates(plan) == ["kept", "truncated", "fully masked"]


def test_a_pair_whose_answers_have_the_same_tokens_is_dropped(judged: Callable[..., SourcePlan]) -> None:
    def pair(chosen: str, rejected: str) -> dict[str, Any]:
        return {"prompt": "Hi?", "chosen": chosen, "rejected": rejected}

    rows = [pair("Yes.", "No."), pair("no " * 60 + "yes", "no " * 60 + "maybe"), pair("yes" + " no" * 60, "no " * 60)]
    plan = judged(rows, max_length=60, overlong="truncate")
    assert fates(plan) == ["kept", "dropped", "truncated"]
    assert reasons(plan)[1] == "the first 60 tokens of chosen and rejected are the same"
    assert plan.tokens[1] > 60


def test_rows_that_were_not_chosen_are_not_encoded(planned: Planned, template: Template, tmp_path: Path) -> None:
    plans = planned(source(write_rows(tmp_path / "a.jsonl", chats(20) * 2), rows=5))
    listener = Listener()
    chosen(plans)
    selection.encode_selected(plans, data_of(plans), template, WorkerPool(listener, 1))
    (plan,) = plans
    encoded = plan.tokens != UNSET
    assert encoded.sum() == 5
    assert (encoded == (plan.fate == selection.fate_code("kept"))).all()
    assert plan.encoded.select_missing(np.arange(40)).tolist() == np.flatnonzero(~encoded).tolist()
    assert listener.titles == ["Encoding rows"]


# ---- sides, shared passages, weights


def test_only_rows_that_are_used_get_a_side(planned: Planned, template: Template, tmp_path: Path) -> None:
    rows = [*chats(30), *chats(5), *[chat(f"{i} " * 80, "x") for i in range(5)]]
    rows += [chat(f"Long {i}?", "yes " * 80) for i in range(5)]
    plans = planned(source(write_rows(tmp_path / "a.jsonl", rows)), max_length=80, overlong="truncate")
    data = data_of(plans, max_length=80, overlong="truncate", split=Split(validation=7, test=8))
    chosen(plans)
    selection.encode_selected(plans, data, template, WorkerPool(Progress(), 1))
    selection.assign_sides(plans, data, 0)
    (plan,) = plans
    assert fates(plan) == ["kept"] * 30 + ["duplicate"] * 5 + ["fully masked"] * 5 + ["truncated"] * 5
    assert (plan.side == UNSET).tolist() == [False] * 30 + [True] * 10 + [False] * 5
    assert [int((plan.side == side).sum()) for side in (TRAIN, VALIDATION, TEST)] == [20, 7, 8]


def on_sides(planned: Planned, path: Path, sides: list[int]) -> SourcePlan:
    """Rows n and n + half of which share passages, kept, and put on these sides."""
    half = len(sides) // 2
    rows = [chat(f"{start}{prose(i)}", f"{start}answer {i}.") for start in ("", "Please: ") for i in range(half)]
    (plan,) = planned(source(write_rows(path, rows)))
    plan.set_fate(np.arange(len(sides)), "kept")
    plan.side[:] = sides
    return plan


def test_shared_passages_mark_training_rows_and_never_held_out_ones(planned: Planned, tmp_path: Path) -> None:
    sides = [TRAIN, TRAIN, TEST, VALIDATION, TEST, TRAIN, TEST, TRAIN, TRAIN, VALIDATION]
    shared = [False, True, False, False, False, False, False, True, True, False]
    for contamination in ("report", "drop", "ignore"):
        plan = on_sides(planned, tmp_path / "a.jsonl", sides)
        listener = Listener()
        selection.mark_contaminated([plan], data_of([plan], contamination=contamination), WorkerPool(listener, 1))
        flagged, taken = np.array(shared) & (contamination != "ignore"), np.array(shared) & (contamination == "drop")
        assert (plan.contaminated == flagged).all(), contamination
        assert [fate == "contaminated" for fate in fates(plan)] == taken.tolist(), contamination
        assert plan.side.tolist() == np.where(taken, UNSET, sides).tolist(), contamination
        assert bool(listener.titles) == (contamination != "ignore")


def test_without_held_out_rows_nothing_is_compared(planned: Planned, tmp_path: Path) -> None:
    plan = on_sides(planned, tmp_path / "a.jsonl", [TRAIN] * 8)
    listener = Listener()
    selection.mark_contaminated([plan], data_of([plan], contamination="drop"), WorkerPool(listener, 1))
    assert (listener.titles, fates(plan)) == ([], ["kept"] * 8)


def test_a_weight_takes_out_training_rows_only_and_marks_them(
    planned: Planned, template: Template, tmp_path: Path
) -> None:
    sources = [
        source(write_rows(tmp_path / f"{name}.jsonl", chats(20, start)), weight=weight)
        for name, start, weight in (("a", 0, 1), ("b", 100, 2))
    ]
    plans = planned(*sources)
    selection.encode_selected(plans, data_of(plans), template, WorkerPool(Progress(), 1))
    for plan in plans:
        plan.side[:] = [TRAIN] * 16 + [VALIDATION, VALIDATION, TEST, TEST]
    selection.apply_weights(plans, 0)
    a, b = plans
    assert (fates(a)[:16].count("kept"), fates(a)[:16].count("not sampled")) == (8, 8)
    assert fates(a)[16:] == ["kept"] * 4
    assert fates(b) == ["kept"] * 20
    beyond = a.fate == selection.fate_code("not sampled")
    assert (a.beyond_weight == beyond).all()
    assert ((a.side == UNSET) == beyond).all()
    assert all("weight 1 of 3" in str(why) for why, out in zip(reasons(a), beyond, strict=True) if out)


def test_without_weights_no_row_is_beyond_one(planned: Planned, tmp_path: Path) -> None:
    plan = on_sides(planned, tmp_path / "a.jsonl", [TRAIN] * 8)
    selection.apply_weights([plan], 0)
    assert (fates(plan), plan.beyond_weight.any()) == (["kept"] * 8, False)


# ---- whatever the recipe says


def test_every_row_ends_with_one_fate_and_the_side_or_reason_that_goes_with_it(
    planned: Planned, template: Template, tmp_path: Path
) -> None:
    rows = [chat(f"{start}{prose(i)}", f"{start}answer {i}.") for start in ("", "Please: ") for i in range(15)]
    rows += [*rows[:4], chat("long " * 400, "x"), chat("Long?", "yes " * 400), chat("no character \ufdd0", "x")]
    long = dialogue(12, 40)
    rows += [
        long,
        {"messages": long["messages"][1:]},
        {"messages": [*chat("Early?", "x")["messages"], *long["messages"][:1]]},
    ]
    a = source(write_rows(tmp_path / "a.jsonl", rows), weight=1)
    b = source(write_rows(tmp_path / "b.jsonl", [*rows[2:6], *chats(30)]), rows=20, weight=1)
    seen: set[str] = set()
    choices = product(("exact", "near", "keep"), ("drop", "truncate", "split"), ("report", "drop", "ignore"))
    for duplicates, overlong, contamination in choices:
        plans = planned(a, b, max_length=600, overlong=overlong)
        data = data_of(plans, duplicates=duplicates, overlong=overlong, contamination=contamination, max_length=600)
        data = data.model_copy(update={"split": Split(validation=0.2, test=0.2)})
        hands = WorkerPool(Progress(), 1)
        selection.deduplicate_and_cap(plans, data, 0, hands)
        selection.encode_selected(plans, data, template, hands)
        selection.assign_sides(plans, data, 0)
        selection.mark_contaminated(plans, data, hands)
        selection.apply_weights(plans, 0)
        for plan in plans:
            for fate, why, side in zip(fates(plan), reasons(plan), plan.side.tolist(), strict=True):
                assert fate in FATES
                assert (why is not None) == (fate in FATES_WITH_REASON)
                assert (side in range(len(SIDES))) == (fate in USED_FATES)
            seen.update(fates(plan))
    assert seen == set(FATES)
