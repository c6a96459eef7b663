"""The run directory: what stages read and write, and how they know what is done.

Each stage has a directory with a `stage.json`: its fingerprint (a hash of everything it depends on), its status, and the
sha256 of what it made. A stage with the same fingerprint and whole outputs is done; with another, its directory is moved
to `superseded/` (and comes back if the recipe does). A run is locked while it is written.

This module does not know which stages there are or what is in them.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from corral.errors import RunError
from corral.recipe import Recipe, parse
from corral.storage import remove_temporary_files, remove_tree, storage_errors, tree_hashes, write_atomic, write_json

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "rapidfuzz", "sacrebleu")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage's directory and the fingerprint of what belongs in it."""

    name: str
    path: Path
    fingerprint: str
    done: bool


class Run:
    """An existing run directory; `Run.open` for writing, `Run(path)` for reading.

    Raises:
        RunError: the path is no run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / "recipe.toml").is_file():
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
        """The promoted model's folder. Raises: RunError (this run has none yet)."""
        folder = self.path / "merge" / "model"
        if not (folder / "config.json").is_file():
            raise RunError("this run has no merged model yet", where=str(folder), hint="finish it: `corral run RECIPE`")
        return folder

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, recipe: Recipe) -> Generator[Run]:
        """Create or take up a run for writing; it is locked until the context ends.

        Raises:
            RunError: another process is writing it, or the directory holds something else or another recipe's run.
        """
        recipe_path = path / "recipe.toml"
        foreign = path.is_dir() and not recipe_path.exists() and not all(_ours(p) for p in path.iterdir())
        if path.is_file() or foreign:
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
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            write_atomic(recipe_path, recipe.to_toml())
            yield cls(path)

    def stage(self, name: str, inputs: Mapping[str, Any], *, claim: bool = True) -> Stage:
        """Claim a stage's directory for these inputs: done, half done, or empty.

        Args:
            inputs: everything the stage depends on, as JSON values; earlier stages by their fingerprints.
            claim: whether to make room for it; otherwise only look.
        """
        text = json.dumps({"corral": corral.__version__, "stage": name, **inputs}, sort_keys=True)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        path = self.path / name
        found = _read_stage(path)
        if not claim:
            done = found is not None and found.get("fingerprint") == fingerprint and _is_done(path, found)
            return Stage(name, path, fingerprint, done)
        if found is not None and _is_damaged(path, found):
            # What was done and is no longer whole cannot be taken up in the middle: it is done anew.
            self._supersede(name, "damaged")
            found = None
        elif found is not None and found.get("fingerprint") != fingerprint:
            self._supersede(name, str(found.get("fingerprint", "unknown")))
            found = None
        kept = self.path / "superseded" / f"{name}-{fingerprint[:12]}"
        if found is None and kept.exists():
            remove_tree(path)
            kept.rename(path)
            found = _read_stage(path)
        if found is None or _is_damaged(path, found):
            remove_tree(path)
            with storage_errors(path):
                path.mkdir(parents=True)
            record = {"name": name, "fingerprint": fingerprint, "status": "running", "inputs": dict(inputs)}
            write_json(path / "stage.json", {**record, "started": _now()})
            return Stage(name, path, fingerprint, done=False)
        if not (done := _is_done(path, found)):
            remove_temporary_files(path)
        return Stage(name, path, fingerprint, done)

    def finish_stage(self, stage: Stage, seconds: float) -> None:
        """Record a stage as done, with the sha256 of every file it made."""
        record: dict[str, Any] = json.loads((stage.path / "stage.json").read_text("utf-8"))
        outputs = {name: digest for name, digest in tree_hashes(stage.path).items() if name != "stage.json"}
        sizes = {name: (stage.path / name).stat().st_size for name in outputs}
        seconds += record.get("seconds", 0.0)
        record |= {"status": "done", "finished": _now(), "seconds": seconds, "outputs": outputs, "sizes": sizes}
        write_json(stage.path / "stage.json", record)

    def record_interruption(self, stage: Stage, seconds: float) -> None:
        """Add the time of an attempt that did not finish."""
        record: dict[str, Any] = json.loads((stage.path / "stage.json").read_text("utf-8"))
        write_json(stage.path / "stage.json", record | {"seconds": record.get("seconds", 0.0) + seconds})

    def write_lineage(self, stages: list[str], extra: Mapping[str, Any]) -> None:
        """lineage.json: which stage made what from what."""
        records = [r for name in stages if (r := _read_stage(self.path / name)) is not None]
        for record in records:
            record.pop("sizes", None)
        write_json(self.path / "lineage.json", {**extra, "stages": records})

    def _supersede(self, name: str, fingerprint: str) -> None:
        target = self.path / "superseded" / f"{name}-{fingerprint[:12]}"
        with storage_errors(target):
            target.parent.mkdir(exist_ok=True)
            # A copy made for the same inputs before this one holds nothing that this one does not.
            remove_tree(target)
            (self.path / name).rename(target)


def _ours(path: Path) -> bool:
    """Whether a file is what an opening of this run, cut short, leaves."""
    return path.name == ".lock" or path.name.startswith(".corral-")


def _read_stage(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / "stage.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        # Cut short by a crash of the machine: what else is there cannot be trusted to belong to any fingerprint.
        return {"fingerprint": "damaged", "status": "running"}


def _is_done(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and _whole(path, record)


def _is_damaged(path: Path, record: Mapping[str, Any]) -> bool:
    return record["status"] == "done" and not _whole(path, record)


def _whole(path: Path, record: Mapping[str, Any]) -> bool:
    sizes: dict[str, int] = record.get("sizes", {})
    return all((path / name).is_file() and (path / name).stat().st_size == size for name, size in sizes.items())


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    with (path / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise RunError(
                f"this run is in use by process {file.read().strip() or 'unknown'}",
                where=str(path),
                hint="wait until it ends, or give another directory with --out",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json; no host name and no path."""
    packages: dict[str, str] = {}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "corral": corral.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory,
        "packages": packages,
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
