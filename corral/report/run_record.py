"""A run directory, read as far as it goes.

Only `recipe.toml` must be there. A file that is absent leaves its part of the record empty; a damaged one is named in
`notes`, so that one bad file never hides the others. Knows nothing about how the files were made, nor what a page shows.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

from corral.errors import RunError

JsonObject: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Training:
    """One training stage: its directory's name, its table in the recipe, and the lines of its metrics.jsonl by step."""

    name: str
    metrics: Sequence[JsonObject]
    settings: JsonObject = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory holds. A missing part is empty.

    Attributes:
        path: the directory, as it was named.
        recipe_text, recipe: recipe.toml as text and as a table.
        completions: lines of evaluate/completions.jsonl.
        exports: contracts of the forms in export/, by file name.
        promoted: whether merge/model is there.
        notes: what could not be read, a sentence each.
    """

    path: Path
    recipe_text: str
    recipe: JsonObject
    environment: JsonObject
    lineage: JsonObject
    ledger: JsonObject
    trainings: Sequence[Training]
    contract: JsonObject
    exports: Sequence[JsonObject]
    scorecard: JsonObject
    completions: Sequence[JsonObject]
    promoted: bool
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """The recipe's name, or the directory's."""
        return str(self.recipe.get("name") or self.path.resolve().name)


def as_object(value: Any) -> JsonObject:
    """The value if it is a JSON object, else an empty one."""
    return cast(JsonObject, value) if isinstance(value, dict) else {}


def as_objects(value: Any) -> list[JsonObject]:
    """The JSON objects in a list, else nothing."""
    return (
        [as_object(item) for item in cast(list[Any], value) if isinstance(item, dict)]
        if isinstance(value, list)
        else []
    )


def as_number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return cast(float, value) if ok else None


def series(metrics: Sequence[JsonObject], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of metrics.jsonl, where it holds a finite number."""
    pairs = [(as_number(line.get("step")), as_number(line.get(key))) for line in metrics]
    whole = [(step, value) for step, value in pairs if step is not None and value is not None]
    return [step for step, _ in whole], [value for _, value in whole]


def _exports(run: Path, notes: list[str]) -> list[JsonObject]:
    found = [*run.glob("export/*.contract.json"), *run.glob("export/*/contract.json")]
    contracts = [_json(run, str(path.relative_to(run)), notes) for path in sorted(found)]
    return [contract for contract in contracts if contract]


def read_run(run: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RunError: it has no recipe.toml, or one that is not TOML.
    """
    path = run / "recipe.toml"
    try:
        text = path.read_bytes().decode("utf-8")
        recipe = tomllib.loads(text)
    except OSError:
        raise RunError(
            "this is not a run directory: it has no recipe.toml that can be read",
            where=str(run),
            hint="give the directory that `corral run` filled",
        ) from None
    except ValueError as error:
        raise RunError(
            f"the run's recipe is damaged: {error}", where=str(path), hint="`corral run RECIPE` writes it again"
        ) from None
    notes: list[str] = []
    promoted = (run / "merge" / "model").is_dir()
    return RunRecord(
        path=run,
        recipe_text=text,
        recipe=recipe,
        environment=_json(run, "environment.json", notes),
        lineage=_json(run, "lineage.json", notes),
        ledger=_json(run, "prepare/ledger.json", notes),
        trainings=_trainings(run, recipe, notes),
        contract=_json(run, f"merge/{'model' if promoted else 'candidate'}/contract.json", notes),
        exports=_exports(run, notes),
        scorecard=_json(run, "evaluate/scorecard.json", notes),
        completions=_json_lines(run, "evaluate/completions.jsonl", notes),
        promoted=promoted,
        notes=notes,
    )


def _trainings(run: Path, recipe: JsonObject, notes: list[str]) -> list[Training]:
    numbered = [(int(m[1]), path.name) for path in run.glob("train-*") if (m := re.match(r"train-(\d+)\b", path.name))]
    settings = as_objects(recipe.get("train"))
    trainings: list[Training] = []
    for number, name in sorted(numbered):
        # A stage that was resumed may have written a step twice: the later line is the one that counts.
        lines = _json_lines(run, f"{name}/metrics.jsonl", notes)
        by_step = {step: line for line in lines if (step := as_number(line.get("step"))) is not None}
        metrics = [by_step[step] for step in sorted(by_step)]
        trainings.append(Training(name, metrics, settings[number - 1] if 0 < number <= len(settings) else {}))
    return [training for training in trainings if training.metrics]


def _json(run: Path, name: str, notes: list[str]) -> JsonObject:
    try:
        value = json.loads((run / name).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{name} is not a JSON object")
    return as_object(value)


def _json_lines(run: Path, name: str, notes: list[str]) -> list[JsonObject]:
    try:
        data = (run / name).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{name} cannot be read: {error}")
        return []
    lines: list[JsonObject] = []
    bad: list[int] = []
    pieces = data.split(b"\n")
    for place, line in enumerate(pieces, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            lines.append(as_object(value))
        elif line.strip() and place < len(pieces):  # what follows the last newline may be a line still being written
            bad.append(place)
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        notes.append(f"{name}: left out what is not a JSON object: line {', '.join(map(str, bad[:5]))}{more}")
    return lines
