"""Whether each stage of a run is done, decided by the `stage.json` in its folder.

The record holds the stage's inputs (everything that its content depends on), its fingerprint (a hash of them), what it was
made with (version, device, machine: recorded, never a reason to redo it), its status, and the sha256 and size of its outputs.
A stage is done if its inputs are the same and its outputs are complete. If the inputs differ, its folder is moved to
`superseded/`, and moved back when the recipe changes back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

import corral
from corral.storage import remove_temporary_files, remove_tree, storage_errors, tree_hashes, write_json

FORMAT = 2
"""Of the records that are written. Records without one, of older versions, name their inputs otherwise."""
_DAMAGED = "damaged"


@dataclass(frozen=True, slots=True)
class Settings:
    """A table of the recipe, as an input of a stage.

    Args:
        values: all settings.
        given: those that differ from their defaults. A setting that an older record does not have had its default then.
    """

    values: Mapping[str, Any]
    given: Mapping[str, Any]

    @classmethod
    def of(cls, section: BaseModel, exclude: Any = None) -> Settings:
        """The settings of a section, without those that do not count."""
        return cls(
            section.model_dump(mode="json", exclude=exclude),
            section.model_dump(mode="json", exclude=exclude, exclude_defaults=True),
        )


@dataclass(frozen=True, slots=True)
class StageFolder:
    """A stage's folder, and what is known of it.

    Args:
        fingerprint: of what belongs in it.
        done: whether that is in it.
        changed: names of the inputs that differ from those it was made from.
        attempt: which time it is made from the same inputs, from 1: later ones take nothing over from earlier ones.
        made_by: the version of corral that made it; empty if that did not record its inputs as this one does.
    """

    name: str
    path: Path
    fingerprint: str
    done: bool
    changed: tuple[str, ...] = ()
    attempt: int = 1
    made_by: str = ""


def find_stage(run: Path, name: str, inputs: Mapping[str, Any]) -> StageFolder:
    """Whether a stage is done for these inputs; changes nothing.

    Args:
        run: the run directory.
        inputs: everything the stage depends on, as JSON values and `Settings`; earlier stages by their fingerprints.
    """
    path = run / name
    record = read_record(path)
    if record is None or record["status"] == _DAMAGED:
        return StageFolder(name, path, _fingerprint(name, inputs), done=False)
    changed = tuple(_changes(record, inputs))
    if changed:
        return StageFolder(name, path, _fingerprint(name, inputs), done=False, changed=changed)
    made_by = record["corral"] if record.get("format") == FORMAT else ""
    return StageFolder(name, path, record["fingerprint"], _is_done(path, record), made_by=made_by)


def claim_stage(run: Path, name: str, inputs: Mapping[str, Any], *, redo: bool = False) -> StageFolder:
    """Prepare a stage's folder for these inputs: done, half done, or empty. Other content is superseded.

    Args:
        run, inputs: as for `find_stage`.
        redo: supersede it also if it is done.
    """
    path = run / name
    record = read_record(path)
    attempt = 1
    if record is not None and _is_done(path, record) and redo:
        earlier_records = (read_record(folder) or {} for folder in (run / "superseded").glob(f"{name}-*"))
        attempt = 1 + max(each.get("attempt", 1) for each in (record, *earlier_records))
        _supersede(run, name, record)
        record = None
    elif record is not None and (_changes(record, inputs) or _is_damaged(path, record)):
        _supersede(run, name, record)
        record = None
    if record is None and attempt == 1 and (earlier := _find_superseded(run, name, inputs)) is not None:
        remove_tree(path)
        earlier.rename(path)
        record = read_record(path)
    if record is None:
        remove_tree(path)
        with storage_errors(path):
            path.mkdir(parents=True)
        record = _new_record(name, inputs, attempt)
        write_json(path / "stage.json", record)
    elif not _is_done(path, record):
        remove_temporary_files(path)
        if record.pop("stopped", None):  # it goes on
            write_json(path / "stage.json", record)
    return StageFolder(name, path, record["fingerprint"], _is_done(path, record), attempt=record.get("attempt", 1))


def earlier_folders(path: Path) -> list[Path]:
    """Superseded folders of the stage in a folder, from which it may take what does not depend on the inputs that changed;
    none if it is made again from the start."""
    if (read_record(path) or {}).get("attempt", 1) > 1:
        return []
    return sorted((path.parent / "superseded").glob(f"{path.name}-*"))


def _new_record(name: str, inputs: Mapping[str, Any], attempt: int) -> dict[str, Any]:
    return {
        "name": name,
        "format": FORMAT,
        "fingerprint": _fingerprint(name, inputs, attempt),
        "attempt": attempt,
        "status": "running",
        "inputs": _json_values(inputs),
        "given": {key: value.given for key, value in inputs.items() if isinstance(value, Settings)},
        "corral": corral.__version__,
        "started": _now(),
    }


def is_superseded(run: Path, name: str, inputs: Mapping[str, Any]) -> bool:
    """Whether a finished stage of these inputs has been superseded, so that `claim_stage` brings it back."""
    earlier = _find_superseded(run, name, inputs)
    return earlier is not None and is_finished(earlier)


def finish_stage(
    stage: StageFolder, seconds: float, made_with: Mapping[str, Any], disposable: tuple[str, ...] = ()
) -> None:
    """Record a stage as done, with the sha256 of every output file, and the size of those that it needs to be done.

    Args:
        made_with: machine, device and the like, for people.
        disposable: beginnings of the names of files that may be missing later.
    """
    outputs = {name: digest for name, digest in tree_hashes(stage.path).items() if name != "stage.json"}
    sizes = {name: (stage.path / name).stat().st_size for name in outputs if not name.startswith(disposable)}
    finished = {"status": "done", "finished": _now(), "made_with": made_with, "outputs": outputs, "sizes": sizes}
    _update_record(stage, seconds, **finished)


def record_interruption(stage: StageFolder, seconds: float, stopped: str = "") -> None:
    """Add the time of an attempt that did not finish, and why a guard stopped it, if one did."""
    _update_record(stage, seconds, **({"stopped": stopped} if stopped else {}))


def read_record(path: Path) -> dict[str, Any] | None:
    """The content of the `stage.json` in a stage's folder; None if there is none; of a damaged one the status alone."""
    try:
        record: Any = json.loads((path / "stage.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if isinstance(record, dict) and {"status", "fingerprint"} <= record.keys():
        return cast("dict[str, Any]", record)
    # The machine crashed while it was written: the other files cannot be trusted to belong to any inputs.
    return {"status": _DAMAGED, "fingerprint": _DAMAGED}


def read_fingerprint(run: Path, name: str) -> str | None:
    """The fingerprint in a stage's record; None if there is no record, or a damaged one."""
    record = read_record(run / name)
    return None if record is None or record["status"] == _DAMAGED else record["fingerprint"]


def missing_output(path: Path) -> str | None:
    """The first file that a stage which was finished has lost or that has another size; None if it has all."""
    sizes: Mapping[str, int] = (read_record(path) or {}).get("sizes", {})
    return next((name for name, size in sizes.items() if not _has_size(path / name, size)), None)


def is_finished(path: Path) -> bool:
    """Whether a stage's folder holds a finished stage with all its outputs, whatever it was made from."""
    record = read_record(path)
    return record is not None and _is_done(path, record)


def superseded_folders(run: Path, stage: StageFolder) -> list[Path]:
    """Folders of earlier settings that a stage may take results over from: those that are not damaged, and none if it is to be
    made from the start."""
    if stage.attempt > 1:
        return []
    folders = sorted((run / "superseded").glob(f"{stage.name}-*"))
    return [path for path in folders if path.name != f"{stage.name}-{_DAMAGED}"]


def find_made(run: Path, name: str, fingerprint: str) -> Path | None:
    """The folder of the finished stage with this fingerprint, which may be superseded by now; None if it is gone."""
    for path in (run / name, _superseded_path(run, name, fingerprint)):
        record = read_record(path)
        if record is not None and (record["status"], record["fingerprint"]) == ("done", fingerprint):
            return path
    return None


def _changes(record: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that differ from those in a record. Of a record of an older version nothing is known."""
    if record["status"] == _DAMAGED:
        return ["a damaged record"]
    if record.get("format") != FORMAT:
        return [] if record["status"] == "done" else ["an unfinished stage of an older version"]
    before: Mapping[str, Any] = record["inputs"]
    counted_before = {name: record.get("given", {}).get(name, value) for name, value in before.items()}
    counted_now = {name: value.given if isinstance(value, Settings) else value for name, value in inputs.items()}
    return list(_differences(before, _json_values(inputs), (counted_before, counted_now)))


def _json_values(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.values if isinstance(value, Settings) else value for key, value in inputs.items()}


def _differences(before: Any, now: Any, given: tuple[Any, Any], path: str = "") -> Iterator[str]:
    """Dotted names of what differs.

    Args:
        given: the parts of both sides that count where the other side has no such key. So a setting that only one version of
            corral knows is a difference only if it is not default.
    """
    if isinstance(before, dict) and isinstance(now, dict):
        sides = cast("tuple[dict[str, Any], dict[str, Any]]", (before, now))
        counts = [cast("dict[str, Any]", part) if isinstance(part, dict) else {} for part in given]
        for key in dict.fromkeys((*sides[0], *sides[1])):
            name = f"{path}.{key}" if path else key
            if all(key in side for side in sides):
                yield from _differences(sides[0][key], sides[1][key], (counts[0].get(key), counts[1].get(key)), name)
            elif any(key in count for count in counts):
                yield name
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):  # pyright: ignore[reportUnknownArgumentType]
        pairs = zip(cast("list[Any]", before), cast("list[Any]", now), strict=True)
        counted = [cast("list[Any]", part) if isinstance(part, list) else [None] * len(now) for part in given]  # pyright: ignore[reportUnknownArgumentType]
        for i, (old, new) in enumerate(pairs):
            yield from _differences(old, new, (counted[0][i], counted[1][i]), f"{path}.{i}")
    elif before != now:
        yield path


def _update_record(stage: StageFolder, seconds: float, **values: Any) -> None:
    path = stage.path / "stage.json"
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    record.pop("stopped", None)  # of the attempt before
    write_json(path, record | values | {"seconds": record.get("seconds", 0.0) + seconds})


def _superseded_path(run: Path, name: str, fingerprint: str) -> Path:
    return run / "superseded" / f"{name}-{fingerprint[:12]}"


def _find_superseded(run: Path, name: str, inputs: Mapping[str, Any]) -> Path | None:
    """The latest superseded folder of the stage that was made from these inputs."""
    found: list[tuple[int, str, Path]] = []
    for path in (run / "superseded").glob(f"{name}-*"):
        record = read_record(path)
        if record is None or record.get("format") != FORMAT or record["name"] != name:
            continue
        if not _changes(record, inputs) and not _is_damaged(path, record):
            found.append((record["attempt"], record["started"], path))
    return max(found)[2] if found else None


def _supersede(run: Path, name: str, record: Mapping[str, Any]) -> None:
    fingerprint = _DAMAGED if _is_damaged(run / name, record) else str(record["fingerprint"])
    target = _superseded_path(run, name, fingerprint)
    with storage_errors(target):
        target.parent.mkdir(exist_ok=True)
        # An older copy of the same fingerprint holds nothing that this one does not.
        remove_tree(target)
        (run / name).rename(target)


def _fingerprint(name: str, inputs: Mapping[str, Any], attempt: int = 1) -> str:
    text = json.dumps(
        {"stage": name, **_json_values(inputs)} | ({"attempt": attempt} if attempt > 1 else {}), sort_keys=True
    )
    return hashlib.sha256(text.encode()).hexdigest()


def _is_done(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and _outputs_complete(path, record)


def _is_damaged(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == _DAMAGED or (record["status"] == "done" and not _outputs_complete(path, record))


def _outputs_complete(path: Path, record: Mapping[str, Any]) -> bool:
    sizes: dict[str, int] = record.get("sizes", {})
    return all(_has_size(path / name, size) for name, size in sizes.items())


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
