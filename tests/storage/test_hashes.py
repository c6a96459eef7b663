"""Hashes of files and folders."""

from __future__ import annotations

import hashlib
from pathlib import Path

from corral.storage import sha256_file, tree_hashes, tree_size


def test_hashes_are_sha256_by_relative_path_in_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").write_bytes(b"abc")
    (tmp_path / "a").write_bytes(b"")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "b" / "x") == abc
    assert list(tree_hashes(tmp_path).items()) == [("a", hashlib.sha256(b"").hexdigest()), ("b/x", abc)]
    assert tree_size(tmp_path) == 3
    assert tree_size(tmp_path / "missing") == 0
