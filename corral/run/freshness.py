"""Which parts of a run are of one state.

After an interrupted change of the recipe a run holds parts of two states: a model that is being made, and scores and exports
of the one before. What shows a run leaves out what is not of its present state, and says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corral.errors import CorralError
from corral.recipe import parse
from corral.run.stage_record import read_record

_TRAINING = re.compile(r"train-(\d+)-")


def stale_stages(run: Path) -> dict[str, str]:
    """The stages that a run holds results of which do not belong to its present state, and why, in words.

    A stage that is being made is of the present state; what was made from its earlier result is not.
    """
    listed, folders = _listed_fingerprints(run), training_stages(run)
    recipe = _recipe_stages(run)
    names = ["prepare", *(folders if recipe is None else recipe), "export", "evaluate"]
    current: dict[str, str | None] = {}
    stale: dict[str, str] = {}
    for name in names:
        record = read_record(run / name)
        if record is None:
            continue
        finished = record["status"] == "done"
        reason = None
        if name != "prepare" and current.get("prepare", "") is None:
            reason = "the rows are being prepared again"
        elif earlier := [b for b, fingerprint in _stages_before(record).items() if current.get(b) != fingerprint]:
            reason = f"it was made from an earlier {earlier[0]}"
        elif (
            name in ("export", "evaluate")
            and recipe
            and recipe[-1] not in _stages_before(record)
            and "format" in record
        ):
            reason = f"it was made without {recipe[-1]}"
        elif finished and listed and listed.get(name) != record["fingerprint"]:
            reason = "it was made for other settings or rows"
        if reason is not None:
            stale[name] = reason
        current[name] = record["fingerprint"] if finished and reason is None else None
    return stale | {name: "the recipe has no such stage" for name in folders if name not in names}


def training_stages(run: Path) -> list[str]:
    """The folders of training stages in a run, in the order of their numbers."""
    numbered = [(int(match[1]), path.name) for path in run.glob("train-*") if (match := _TRAINING.match(path.name))]
    return [name for _, name in sorted(numbered)]


def _recipe_stages(run: Path) -> Sequence[str] | None:
    """The names of the recipe's training stages; None if it cannot be read."""
    try:
        return parse((run / "recipe.toml").read_text("utf-8"), where=str(run)).stage_names
    except (OSError, CorralError):
        return None


def _stages_before(record: Mapping[str, Any]) -> Mapping[str, str]:
    return record.get("inputs", {}).get("stages", {})


def _listed_fingerprints(run: Path) -> Mapping[str, str]:
    """Fingerprints by stage, as the lineage has them; empty if there is none."""
    try:
        stages = json.loads((run / "lineage.json").read_text("utf-8"))["stages"]
        return {stage["name"]: stage["fingerprint"] for stage in stages}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
