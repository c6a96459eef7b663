"""What an answer depends on: the hashes by which finished rows and batches are recognised."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import corral
from corral.answering.identity import (
    fingerprint_with_settings,
    model_digest,
    row_digest,
    source_examples_digest,
    training_examples_digest,
    variant_digest,
)
from corral.errors import DataError
from corral.model.folder import model_identity
from corral.model.naming import ModelFiles
from corral.recipe import Answer
from corral.recipe.answer import Shots
from corral.run.directory import Run

TEMPLATE: Any = SimpleNamespace(digest="d" * 64, fingerprint="f" * 64)


def test_what_is_hashed_stays_the_same_so_that_finished_rows_are_recognised(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corral.__version__", "1.2.3")
    text = f"{model_identity(tiny_folder)} {'d' * 64} vllm"
    assert model_digest(ModelFiles(tiny_folder, None), TEMPLATE, "vllm") == hashlib.sha256(text.encode()).hexdigest()
    assert (
        variant_digest("w", TEMPLATE, "openvino", "cpu", "float32")
        == "807b58fd23acff970e090bd8b40cb2a5744ac491d98c5034405ac7ca9ef5d8ae"
    )
    assert row_digest("m", "loss") == "365f45a0e6e12ab1"


def test_a_row_depends_on_settings_seed_and_the_examples_that_are_shown() -> None:
    def digest(shots: dict[str, Any], seed: int = 0, **examples: str) -> str:
        return row_digest("m", "answers", Answer.model_validate({"shots": shots}), seed, **examples)

    shown, sourced = {"count": 1}, {"count": 1, "source": {"path": "rows.jsonl"}}
    assert digest({}, own="a", source="a") == digest({}, own="b", source="b"), "no examples are shown"
    assert (
        digest(shown, own="a", source="a") == digest(shown, own="a", source="b") != digest(shown, own="b", source="a")
    )
    assert (
        digest(sourced, own="a", source="a")
        == digest(sourced, own="b", source="a")
        != digest(sourced, own="a", source="b")
    )
    assert digest({}) != digest({}, seed=1)
    # Rows that were all sampled with one seed must not be taken for rows with seeds of their own.
    plain, sampled = Answer(), Answer(temperature=0.7)
    assert row_digest("m", "answers", plain) == _digest_of(["m", "answers", plain.model_dump(mode="json"), 0])
    assert row_digest("m", "answers", sampled) != _digest_of(["m", "answers", sampled.model_dump(mode="json"), 0])
    assert fingerprint_with_settings("a", Answer()) != fingerprint_with_settings("a", Answer(reasoning=True))


def _digest_of(depends: list[Any]) -> str:
    text = json.dumps([corral.__version__, *depends], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_digest_of_examples_follows_the_rows_they_come_from(tmp_path: Path) -> None:
    def shots(**changes: Any) -> Shots:
        return Shots.model_validate({"count": 2, "source": {"path": str(tmp_path / "rows.jsonl")}} | changes)

    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    before = source_examples_digest(shots())
    assert before
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "c"}\n')
    assert source_examples_digest(shots()) not in ("", before)
    assert source_examples_digest(shots(count=0)) == source_examples_digest(shots(source=None)) == ""

    (tmp_path / "recipe.toml").write_text("")
    run = Run(tmp_path)
    with pytest.raises(DataError, match="no prepared rows"):
        training_examples_digest(run)
    (tmp_path / "prepare").mkdir()
    (tmp_path / "prepare" / "stage.json").write_text('{"fingerprint": "abc"}')
    assert training_examples_digest(run) == "abc"
