"""Whether each stage of a run is done, decided by the `stage.json` in its directory.

The record holds the stage's fingerprint (a hash of everything it depends on), its status, and the sha256 and size of its
outputs. A stage is done if its fingerprint is the same and its outputs are complete. If the fingerprint differs, its
directory is moved to `superseded/`, and moved back when the recipe changes back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import corral
from corral.storage import remove_temporary_files, remove_tree, storage_errors, tree_hashes, write_json

_DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage's directory, the fingerprint of what belongs in it, and whether it is done."""

    name: str
    path: Path
    fingerprint: str
    done: bool


def find_stage(run: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
    """Whether a stage is done for these inputs; changes nothing.

    Args:
        run: the run directory.
        inputs: everything the stage depends on, as JSON values; earlier stages by their fingerprints.
    """
    path, fingerprint = run / name, _fingerprint(name, inputs)
    record = read_record(path)
    done = record is not None and record.get("fingerprint") == fingerprint and _is_done(path, record)
    return Stage(name, path, fingerprint, done)


def claim_stage(run: Path, name: str, inputs: Mapping[str, Any]) -> Stage:
    """Prepare a stage's directory for these inputs: done, half done, or empty. Other content is superseded.

    Args:
        run, inputs: as for `find_stage`.
    """
    path, fingerprint = run / name, _fingerprint(name, inputs)
    record = read_record(path)
    if record is not None and _is_damaged(path, record):
        _supersede(run, name, "damaged")
        record = None
    elif record is not None and record.get("fingerprint") != fingerprint:
        _supersede(run, name, str(record.get("fingerprint", "unknown")))
        record = None
    superseded = _superseded_path(run, name, fingerprint)
    if record is None and superseded.exists():
        remove_tree(path)
        superseded.rename(path)
        record = read_record(path)
    if record is None or _is_damaged(path, record):
        remove_tree(path)
        with storage_errors(path):
            path.mkdir(parents=True)
        record = {"name": name, "fingerprint": fingerprint, "status": "running", "inputs": dict(inputs)}
        write_json(path / "stage.json", {**record, "started": _now()})
    elif not _is_done(path, record):
        remove_temporary_files(path)
    return Stage(name, path, fingerprint, _is_done(path, record))


def finish_stage(stage: Stage, seconds: float) -> None:
    """Record a stage as done, with the sha256 and size of every output file."""
    outputs = {name: digest for name, digest in tree_hashes(stage.path).items() if name != "stage.json"}
    sizes = {name: (stage.path / name).stat().st_size for name in outputs}
    _update_record(stage, seconds, status="done", finished=_now(), outputs=outputs, sizes=sizes)


def record_interruption(stage: Stage, seconds: float) -> None:
    """Add the time of an attempt that did not finish."""
    _update_record(stage, seconds)


def _update_record(stage: Stage, seconds: float, **values: Any) -> None:
    path = stage.path / "stage.json"
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    write_json(path, record | values | {"seconds": record.get("seconds", 0.0) + seconds})


def _superseded_path(run: Path, name: str, fingerprint: str) -> Path:
    return run / "superseded" / f"{name}-{fingerprint[:12]}"


def _supersede(run: Path, name: str, fingerprint: str) -> None:
    target = _superseded_path(run, name, fingerprint)
    with storage_errors(target):
        target.parent.mkdir(exist_ok=True)
        # An older copy of the same fingerprint holds nothing that this one does not.
        remove_tree(target)
        (run / name).rename(target)


def _fingerprint(name: str, inputs: Mapping[str, Any]) -> str:
    text = json.dumps({"corral": corral.__version__, "stage": name, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of the `stage.json` in a stage's directory; None if there is none."""
    try:
        return json.loads((path / "stage.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        # The machine crashed while it was written: the other files cannot be trusted to belong to any fingerprint.
        return {"fingerprint": _DAMAGED, "status": "running"}


def read_fingerprint(run: Path, name: str) -> str | None:
    """The fingerprint in a stage's record; None if there is no record, or a damaged one."""
    fingerprint = (read_record(run / name) or {}).get("fingerprint")
    return None if fingerprint == _DAMAGED else fingerprint


def _is_done(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and _outputs_complete(path, record)


def _is_damaged(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and not _outputs_complete(path, record)


def _outputs_complete(path: Path, record: Mapping[str, Any]) -> bool:
    sizes: dict[str, int] = record.get("sizes", {})
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
