"""Reads the files of a run directory for the report.

Only `recipe.toml` must exist. The part of a missing file is empty; a damaged file is named in `notes` and does not hide the
others.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from pydantic import ValidationError

from corral.errors import InputError, RunError
from corral.evaluation.alignment_gate import AFTER, COMPARISON_FOLDER, GateResult, check_aligned_model
from corral.evaluation.alignment_gate import SCORECARD as COMPARISON_CARD
from corral.evaluation.scorecard import Scorecard
from corral.evaluation.scoring import abbreviate
from corral.export_forms import CONTRACT_FILE
from corral.recipe.alignment import Guards
from corral.run.freshness import stale_stages, training_stages
from corral.run.promotion import MERGED_FOLDER, earlier_model_note, model_folder
from corral.run.stage_record import read_record
from corral.training.alignment_warnings import WARNINGS_FILE

JsonObject: TypeAlias = Mapping[str, Any]

SCORECARD = "evaluate/scorecard.json"


@dataclass(frozen=True, slots=True)
class Training:
    """One training stage.

    Args:
        name: of its folder.
        metrics: the lines of its metrics.jsonl by step.
        settings: its table in the recipe.
        start: the stage whose model it started from; empty for the base model.
        comparison: of a stage that aligns: its model against the one that it started from, on validation rows.
        gate: what that says of its model.
        warnings: what was said of its settings and rows before it trained.
        stopped: why a guard stopped it, if it has not gone on since.
        promoted: whether the run stands for its model.
    """

    name: str
    metrics: Sequence[JsonObject]
    settings: JsonObject = field(default_factory=dict[str, Any])
    start: str = ""
    comparison: Scorecard | None = None
    gate: GateResult | None = None
    warnings: Sequence[str] = ()
    stopped: str = ""
    promoted: bool = False


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run directory holds. A missing part is empty.

    Attributes:
        path: the directory, as the caller gave it.
        recipe_text, recipe: recipe.toml as text and as a table.
        completions: lines of evaluate/completions.jsonl.
        exports: contracts of the forms in export/, in the order of their file names.
        promoted: whether the run stands for a model.
        notes: one sentence for each file that could not be read.
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
    scorecard: Scorecard | None
    completions: Sequence[JsonObject]
    promoted: bool
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """The recipe's name, else the directory's."""
        return str(self.recipe.get("name") or self.path.resolve().name)


def as_object(value: Any) -> JsonObject:
    """The value if it is a JSON object, else an empty object."""
    return cast(JsonObject, value) if isinstance(value, dict) else {}


def as_objects(value: Any) -> list[JsonObject]:
    """The JSON objects in a list; none if the value is not a list."""
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


def read_run(run: Path) -> RunRecord:
    """Read a run directory. Raises: RunError (it has no recipe.toml, or one that is not TOML)."""
    path = run / "recipe.toml"
    try:
        text = path.read_bytes().decode("utf-8")
        recipe = tomllib.loads(text)
    except OSError:
        raise RunError(
            "this is not a run directory: it has no readable recipe.toml",
            where=str(run),
            hint="give the directory that `corral run` wrote",
        ) from None
    except ValueError as error:
        raise RunError(
            f"the run's recipe is damaged: {error}", where=str(path), hint="`corral run RECIPE` writes it again"
        ) from None
    notes: list[str] = []
    stale = stale_stages(run)
    notes += [f"{name} is not shown: {reason}" for name, reason in stale.items()]
    tables = as_objects(recipe.get("train"))
    promoted = _promoted_model(run, notes)
    shown = [_training(run, name, tables, notes) for name in training_stages(run) if name not in stale]
    is_promoted = {promoted.parent.name} if promoted else set[str]()
    trainings = [replace(each, promoted=each.name in is_promoted) for each in shown if each.metrics]
    notes += [f"{each.name} was {each.stopped}" for each in shown if each.stopped and not each.metrics]
    # Of a run that promoted nothing: the contract that failed, if there is one.
    certified = promoted or next((run / training.name / MERGED_FOLDER for training in reversed(trainings)), run)
    is_evaluated = "evaluate" not in stale
    return RunRecord(
        path=run,
        recipe_text=text,
        recipe=recipe,
        environment=_json(run, "environment.json", notes),
        lineage=_json(run, "lineage.json", notes),
        ledger=_json(run, "prepare/ledger.json", notes),
        trainings=trainings,
        contract=_json(run, str((certified / CONTRACT_FILE).relative_to(run)), notes),
        exports=[] if "export" in stale else _exports(run, notes),
        scorecard=_scorecard(run, SCORECARD, notes) if is_evaluated else None,
        completions=_json_lines(run, "evaluate/completions.jsonl", notes) if is_evaluated else [],
        promoted=promoted is not None,
        notes=notes,
    )


def _promoted_model(run: Path, notes: list[str]) -> Path | None:
    """The folder of the promoted model, if it is of the run's present state."""
    if (note := earlier_model_note(run)) is not None:
        notes.append(f"`corral chat` and `corral serve` still answer with the earlier model: {note}")
        return None
    try:
        return model_folder(run)
    except RunError:
        return None


def _training(run: Path, name: str, tables: Sequence[JsonObject], notes: list[str]) -> Training:
    # A resumed stage may have written a step twice; the later line counts.
    lines = _json_lines(run, f"{name}/metrics.jsonl", notes)
    by_step = {step: line for line in lines if (step := as_number(line.get("step"))) is not None}
    number = int(name.split("-")[1])
    record = read_record(run / name) or {}
    before = as_object(as_object(record.get("inputs")).get("stages"))
    settings = tables[number - 1] if 0 < number <= len(tables) else {}
    metrics = [by_step[step] for step in sorted(by_step)]
    warnings = _json_texts(run, f"{name}/{WARNINGS_FILE}", notes)
    training = Training(
        name, metrics, settings, next(iter(before), ""), warnings=warnings, stopped=str(record.get("stopped", ""))
    )
    comparison = _scorecard(run, f"{name}/{COMPARISON_FOLDER}/{COMPARISON_CARD}", notes)
    if comparison is None or AFTER not in comparison.variants:  # only what quantisation costs is known yet
        return training
    try:
        guards = Guards.model_validate(as_object(settings.get("guards")))
    except ValidationError:
        guards = Guards()
    return replace(training, comparison=comparison, gate=check_aligned_model(run / name, guards))


def _exports(run: Path, notes: list[str]) -> list[JsonObject]:
    paths = [*run.glob("export/*.contract.json"), *run.glob("export/*/contract.json")]
    contracts = [_json(run, str(path.relative_to(run)), notes) for path in sorted(paths)]
    return [contract for contract in contracts if contract]


def _scorecard(run: Path, name: str, notes: list[str]) -> Scorecard | None:
    data = _read(run, name, notes)
    try:
        return None if data is None else Scorecard.from_json(data.decode("utf-8"))
    except (UnicodeDecodeError, InputError) as error:
        notes.append(f"{name} cannot be read: {error.what if isinstance(error, InputError) else error}")
        return None


def _json(run: Path, name: str, notes: list[str]) -> JsonObject:
    data = _read(run, name, notes)
    try:
        value = {} if data is None else json.loads(data)
    except ValueError as error:
        notes.append(f"{name} cannot be read: {error}")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{name} is not a JSON object")
    return as_object(value)


def _json_texts(run: Path, name: str, notes: list[str]) -> list[str]:
    """A JSON list of texts."""
    data = _read(run, name, notes)
    try:
        value: Any = json.loads(data) if data is not None else []
        if not isinstance(value, list):
            raise ValueError("it is not a list")
    except ValueError as error:
        notes.append(f"{name} cannot be read: {error}")
        return []
    return [str(text) for text in cast("list[Any]", value)]


def _json_lines(run: Path, name: str, notes: list[str]) -> list[JsonObject]:
    lines: list[JsonObject] = []
    bad: list[str] = []
    pieces = (_read(run, name, notes) or b"").split(b"\n")
    for number, line in enumerate(pieces, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            lines.append(as_object(value))
        elif line.strip() and number < len(pieces):  # the last line may still be being written
            bad.append(str(number))
    if bad:
        notes.append(f"{name}: skipped lines that are not JSON objects: {abbreviate(bad)}")
    return lines


def _read(run: Path, name: str, notes: list[str]) -> bytes | None:
    try:
        return (run / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        notes.append(f"{name} cannot be read: {error}")
        return None
