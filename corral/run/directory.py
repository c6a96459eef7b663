"""The run directory: what stages read and write, and whether each stage is done.

Each stage has a directory with a `stage.json`: its fingerprint (a hash of everything it depends on), its status, and the
sha256 of its outputs. A stage is done if its fingerprint is the same and its outputs are complete. If the fingerprint
differs, its directory is moved to `superseded/`, and moved back when the recipe changes back. A run is locked while it is
written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import corral
from corral import system
from corral.errors import RunError
from corral.recipe import Recipe, parse
from corral.storage import (
    file_lock,
    remove_temporary_files,
    remove_tree,
    storage_errors,
    tree_hashes,
    write_atomic,
    write_json,
)

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "rapidfuzz", "sacrebleu")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage's directory, the fingerprint of what belongs in it, and whether it is done."""

    name: str
    path: Path
    fingerprint: str
    done: bool


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return (path / "recipe.toml").is_file()


class Run:
    """An existing run directory; `Run.open` for writing, `Run(path)` for reading.

    Raises:
        RunError: the path is no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not is_run(path):
            raise RunError(
                "this is not a run directory: it has no recipe.toml",
                where=str(path),
                hint="`corral run RECIPE` makes one",
            )

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that filled this run."""
        path = self.path / "recipe.toml"
        return parse(path.read_text("utf-8"), where=str(path))

    @property
    def merged_model(self) -> Path:
        """The promoted model's folder. Raises RunError if this run has none yet."""
        folder = self.path / "merge" / "model"
        if not (folder / "config.json").is_file():
            raise RunError("this run has no merged model yet", where=str(folder), hint="finish it: `corral run RECIPE`")
        return folder

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, recipe: Recipe) -> Generator[Run]:
        """Create a run or open an existing one for writing; it is locked until the context ends.

        Raises:
            RunError: another process is writing it, or the directory holds other files or another recipe's run.
        """
        recipe_path = path / "recipe.toml"
        # An earlier start that was cut short may have left a lock or temporary files of corral, and no recipe.
        other_files = path.is_dir() and any(p.name != ".lock" and p.name[:8] != ".corral-" for p in path.iterdir())
        if path.is_file() or (other_files and not recipe_path.exists()):
            raise RunError(
                "the output directory exists and is not a run",
                where=str(path),
                hint="give another directory with --out, or empty this one",
            )
        if recipe_path.exists() and (other := cls(path).recipe.name) != recipe.name:
            raise RunError(
                f"this run belongs to the recipe {other!r}, not {recipe.name!r}",
                where=str(path),
                hint="give another directory with --out",
            )
        with _locked(path):
            write_atomic(recipe_path, recipe.to_toml())
            yield cls(path)

    def find_stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Whether a stage is done for these inputs; changes nothing.

        Args:
            inputs: everything the stage depends on, as JSON values; earlier stages by their fingerprints.
        """
        path, fingerprint = self.path / name, _fingerprint(name, inputs)
        record = _read_record(path)
        done = record is not None and record.get("fingerprint") == fingerprint and _is_done(path, record)
        return Stage(name, path, fingerprint, done)

    def claim_stage(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Prepare a stage's directory for these inputs: done, half done, or empty. Other content is superseded.

        Args:
            inputs: as for `find_stage`.
        """
        path, fingerprint = self.path / name, _fingerprint(name, inputs)
        record = _read_record(path)
        if record is not None and _is_damaged(path, record):
            self._supersede(name, "damaged")
            record = None
        elif record is not None and record.get("fingerprint") != fingerprint:
            self._supersede(name, str(record.get("fingerprint", "unknown")))
            record = None
        superseded = self._superseded_path(name, fingerprint)
        if record is None and superseded.exists():
            remove_tree(path)
            superseded.rename(path)
            record = _read_record(path)
        if record is None or _is_damaged(path, record):
            remove_tree(path)
            with storage_errors(path):
                path.mkdir(parents=True)
            record = {"name": name, "fingerprint": fingerprint, "status": "running", "inputs": dict(inputs)}
            write_json(path / "stage.json", {**record, "started": _now()})
        elif not _is_done(path, record):
            remove_temporary_files(path)
        return Stage(name, path, fingerprint, _is_done(path, record))

    def finish_stage(self, stage: Stage, seconds: float) -> None:
        """Record a stage as done, with the sha256 and size of every output file."""
        outputs = {name: digest for name, digest in tree_hashes(stage.path).items() if name != "stage.json"}
        sizes = {name: (stage.path / name).stat().st_size for name in outputs}
        self._update_record(stage, seconds, status="done", finished=_now(), outputs=outputs, sizes=sizes)

    def record_interruption(self, stage: Stage, seconds: float) -> None:
        """Add the time of an attempt that did not finish."""
        self._update_record(stage, seconds)

    def _update_record(self, stage: Stage, seconds: float, **values: Any) -> None:
        path = stage.path / "stage.json"
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        write_json(path, record | values | {"seconds": record.get("seconds", 0.0) + seconds})

    def write_lineage(self, stages: list[str], extra: Mapping[str, Any]) -> None:
        """Write lineage.json: each stage's inputs, outputs and their hashes."""
        records = [r for name in stages if (r := _read_record(self.path / name)) is not None]
        for record in records:
            record.pop("sizes", None)
        write_json(self.path / "lineage.json", {**extra, "stages": records})

    def _superseded_path(self, name: str, fingerprint: str) -> Path:
        return self.path / "superseded" / f"{name}-{fingerprint[:12]}"

    def _supersede(self, name: str, fingerprint: str) -> None:
        target = self._superseded_path(name, fingerprint)
        with storage_errors(target):
            target.parent.mkdir(exist_ok=True)
            # An older copy of the same fingerprint holds nothing that this one does not.
            remove_tree(target)
            (self.path / name).rename(target)


def _fingerprint(name: str, inputs: Mapping[str, Any]) -> str:
    text = json.dumps({"corral": corral.__version__, "stage": name, **inputs}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_record(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "stage.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        # The machine crashed while it was written: the other files cannot be trusted to belong to any fingerprint.
        return {"fingerprint": "damaged", "status": "running"}


def _is_done(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and _outputs_complete(path, record)


def _is_damaged(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and not _outputs_complete(path, record)


def _outputs_complete(path: Path, record: Mapping[str, Any]) -> bool:
    sizes: dict[str, int] = record.get("sizes", {})
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items())


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    """Holds the run's lock file, in which the holder's process id stands."""
    lock = path / ".lock"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(lock, wait=False))
        except TimeoutError:
            holder = ""
            with contextlib.suppress(OSError):  # Windows lets nobody read a locked file
                holder = lock.read_text()
            raise RunError(
                f"this run is in use by process {holder.strip() or 'unknown'}",
                where=str(path),
                hint="wait until it ends, or give another directory with --out",
            ) from None
        lock.write_text(str(os.getpid()))
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json; no host name and no path."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "corral": corral.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": system.processor_name(),
        "cores": system.available_cores(),
        "memory_bytes": system.total_memory(),
        "packages": packages,
    }
