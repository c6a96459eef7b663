"""The run directory: its recipe, what was made from what (lineage), and the lock that is held while it is written.

`stage_record` decides whether each stage in it is done.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Generator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import corral
from corral import system
from corral.errors import RunError
from corral.recipe import Recipe, parse
from corral.run.promotion import model_folder
from corral.run.stage_record import read_record
from corral.storage import file_lock, write_atomic, write_json

_PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy", "rapidfuzz", "sacrebleu")


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
    def model(self) -> Path:
        """The promoted model's folder. Raises RunError if this run has none."""
        return model_folder(self.path)

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, recipe: Recipe) -> Generator[Run]:
        """Create a run or open an existing one, whose recipe stays, for writing; it is locked until the context ends.

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
            if not recipe_path.exists():
                write_atomic(recipe_path, recipe.to_toml())
            yield cls(path)

    def write_recipe(self, recipe: Recipe) -> None:
        """Replace the recipe of the run."""
        write_atomic(self.path / "recipe.toml", recipe.to_toml())

    def write_lineage(self, stages: list[str], extra: Mapping[str, Any]) -> None:
        """Write lineage.json: each stage's inputs, outputs and their hashes."""
        records = [r for name in stages if (r := read_record(self.path / name)) is not None]
        for record in records:
            record.pop("sizes", None)
        write_json(self.path / "lineage.json", {**extra, "stages": records})


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
