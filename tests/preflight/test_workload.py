"""The workload of a stage, from rows made here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from corral.data.packing import pack_sequences
from corral.preflight.workload import Workload
from corral.recipe import Train
from corral.training.mismatched_rows import MismatchedRows
from corral.training.sampler import BatchSampler
from corral.training.single_answers import SingleAnswers
from tests.data.conftest import write_examples
from tests.training.tiny import make_examples


@pytest.fixture(scope="module")
def prepared(encoded_rows: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    sides = {}
    for name, rows in (("train", encoded_rows[4:]), ("validation", encoded_rows[:4])):
        sides[name] = write_examples(tmp_path_factory.mktemp("rows") / name, make_examples(rows), seed=3)
    return SimpleNamespace(**sides)


def test_steps_tokens_and_the_longest_pack_are_those_of_the_order(prepared: Any) -> None:
    train = Train(steps=11, batch_size=3, evaluate_every=4, checkpoint_every=5, pack_length=128)
    work = Workload.from_stage(train, prepared, 9)
    lengths = prepared.train.lengths
    order = BatchSampler(train, lengths.tolist(), 9)
    batches = [order.batch(step) for step in range(1, 12)]
    assert work.steps == 11
    assert work.tokens == sum(int(lengths[b].sum()) for b in batches)
    every_pack = [[b[i] for i in pack] for b in batches for pack in pack_sequences([int(lengths[i]) for i in b], 128)]
    assert work.longest[0] == max(int(lengths[p].sum()) for p in every_pack)
    assert set(work.heavy) <= set(range(len(lengths)))
    again = pack_sequences([int(lengths[i]) for i in work.heavy], 128)
    assert max(sum(int(lengths[work.heavy[i]]) for i in pack) for pack in again) == work.longest[0]
    assert (work.evaluations, work.checkpoints) == (
        1 + 3,
        3,
    )  # before the first step, after 4, 8 and the last; 5, 10, 11
    assert work.evaluated == int(prepared.validation.lengths.sum())


def test_an_objective_with_a_reference_has_all_rows_read_once_more(prepared: Any) -> None:
    settings: dict[str, Any] = {"steps": 2, "pack_length": 128, "evaluate_rows": 3}
    dpo, simpo = (Workload.from_stage(Train(objective=name, **settings), prepared, 9) for name in ("dpo", "simpo"))
    lengths = [*prepared.train.lengths.tolist(), *prepared.validation.lengths[:3].tolist()]
    assert (dpo.reference, simpo.reference) == (sum(lengths), 0)
    assert dpo.seconds(10, 0, 20, 0, 0) - simpo.seconds(10, 0, 20, 0, 0) == pytest.approx(sum(lengths) / 20)


def test_what_kto_reads_for_its_kl_takes_time_and_no_memory(prepared: Any) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 3, "pack_length": 128}
    sides = {
        name: MismatchedRows(SingleAnswers(rows, rows.sequence_figures()))
        for name, rows in (("train", prepared.train), ("validation", prepared.validation))
    }
    arranged: Any = SimpleNamespace(**sides)
    kto, plain = (
        Workload.from_stage(Train(objective=name, **settings), rows, 9)
        for name, rows in (("kto", arranged), ("ulma", prepared))
    )
    assert kto.longest == plain.longest
    assert kto.tokens == sum(len(s.ids) for row in arranged.train for s in row.sequences) > 1.5 * plain.tokens
    assert kto.evaluated == sum(len(s.ids) for row in arranged.validation for s in row.sequences)
    assert kto.reference == kto.tokens + kto.evaluated
