from __future__ import annotations

import sys
from pathlib import Path

import pytest

from corral.errors import MissingExtraError
from corral.extras import require


def test_what_is_installed_is_imported() -> None:
    import json.decoder

    assert require("json.decoder", "anything") is json.decoder


def test_what_is_missing_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(MissingExtraError, match="'nowhere_at_all'") as caught:
        require("nowhere_at_all.inside", "moon")
    assert caught.value.hint == 'pip install "corral[moon]"'
    assert caught.value.exit_code == 3
    assert caught.value.__cause__ is None


def test_what_is_missing_beneath_an_installed_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_another.py").write_text("import the_other_one")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="'the_other_one'"):
        require("needs_another", "moon")


def test_a_package_that_is_broken_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ZeroDivisionError):
        require("broken_one", "moon")


def test_a_package_that_is_hidden_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError) as caught:
        require("openvino", "openvino")
    assert caught.value.hint == 'pip install "corral[openvino]"'
