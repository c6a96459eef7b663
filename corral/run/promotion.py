"""Which model a run stands for: a small file, `model` in the run, that chat, server, exports and reports follow.

It names the training stage whose merged model was promoted, by fingerprint, with the hash of its files and the reason. The
stage may be superseded since: until another one is promoted, the run still stands for that model. A run that has no other
model stands for the one that a stage which may not be promoted started from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from corral.errors import RunError
from corral.export_forms import CONTRACT_FILE
from corral.run.stage_record import StageFolder, find_made, is_finished, read_record
from corral.storage import write_json

MERGED_FOLDER = "merged"
"""The folder in a training stage's folder that holds its whole model."""
_POINTER = "model"
_OLD_MODEL = Path("merge") / "model"  # of runs that were made before there was a pointer


@dataclass(frozen=True, slots=True)
class Promotion:
    """A promoted model.

    Args:
        stage: the training stage that made it.
        fingerprint: of that stage.
        sha256: of the names and hashes of the model's files.
        reason: why it was promoted, for people.
        promoted: when, in ISO 8601.
        instead_of: the stage that may not be promoted, if this is the model that it started from; else empty.
    """

    stage: str
    fingerprint: str
    sha256: str
    reason: str
    promoted: str
    instead_of: str = ""


def promote(run: Path, stage: StageFolder, reason: str, *, instead_of: str = "") -> None:
    """Let a run stand for the model of a finished training stage; nothing is written if it does so already.

    In a run of an older version the contract is elsewhere, and so is its promoted model.
    """
    record = read_record(stage.path)
    if record is None or not (stage.path / MERGED_FOLDER / CONTRACT_FILE).is_file():
        return
    files = {name: digest for name, digest in record["outputs"].items() if name.startswith(f"{MERGED_FOLDER}/")}
    sha256 = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    current = None
    with contextlib.suppress(RunError):  # a damaged pointer is written again
        current = read_promotion(run)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    new = Promotion(stage.name, stage.fingerprint, sha256, reason, now, instead_of)
    if current is None or _without_reason(current) != _without_reason(new):
        write_json(run / _POINTER, asdict(new))


def promote_start(run: Path, start: StageFolder, stage: str) -> bool:
    """Let a run without a model of its own stand for the one that a stage which may not be promoted started from.

    Args:
        start: the training stage that made it.
        stage: the one that started from it.

    Returns: whether the run stands for it.
    """
    try:
        has_model = model_folder(run).is_dir()
        current = read_promotion(run)
    except RunError:
        has_model, current = False, None
    if has_model and (current is None or not (current.instead_of or current.fingerprint == start.fingerprint)):
        return False
    promote(run, start, f"{stage} started from it, and may not be promoted", instead_of=stage)
    current = read_promotion(run)
    return current is not None and current.instead_of == stage


def _without_reason(promotion: Promotion) -> Promotion:
    return replace(promotion, reason="", promoted="")


def read_promotion(run: Path) -> Promotion | None:
    """The promoted model of a run; None if there is none yet. Raises: RunError (the pointer is damaged)."""
    path = run / _POINTER
    try:
        return Promotion(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"the pointer to the run's model cannot be read: {error}",
            where=str(path),
            hint="`corral run RECIPE` writes it again once the training stages are finished",
        ) from None


def model_folder(run: Path) -> Path:
    """The folder of a run's promoted model. Raises: RunError (there is none, or it is gone)."""
    promotion = read_promotion(run)
    if promotion is None:
        folder = run / _OLD_MODEL
        if not (folder / "config.json").is_file():
            raise RunError("this run has no model yet", where=str(run), hint="finish it: `corral run RECIPE`")
        return folder
    stage = find_made(run, promotion.stage, promotion.fingerprint)
    if stage is None or not (stage / MERGED_FOLDER / "config.json").is_file():
        raise RunError(
            f"the run's model, made by {promotion.stage}, is not there any more",
            where=str(run / promotion.stage / MERGED_FOLDER),
            hint="copy the whole run, or make it again: `corral run RECIPE`",
        )
    return stage / MERGED_FOLDER


def earlier_model_note(run: Path) -> str | None:
    """What to say where the promoted model is not that of the run's last stage as it stands now; None if it is."""
    promotion = read_promotion(run)
    if promotion is None:
        return None
    if promotion.instead_of:
        return (
            f"{promotion.instead_of} left no model that may be promoted (`corral run RECIPE` says why): this is the model of "
            f"{promotion.stage}, which it started from"
        )
    if find_made(run, promotion.stage, promotion.fingerprint) == run / promotion.stage:
        return None
    earlier = f"this is the model promoted on {promotion.promoted[:10]}, of its settings before"
    if is_finished(run / promotion.stage):
        return f"the model of {promotion.stage} as it is now was not promoted (`corral run RECIPE` says why): {earlier}"
    return f"{promotion.stage} is being made again: {earlier}"
