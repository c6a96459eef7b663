"""Metrics of a training stage, sent on to TensorBoard, Weights & Biases or MLflow, through accelerate's trackers.

Knows nothing about how metrics come about. A tracker that fails in the middle of a stage is given up with a word: training
does not end because a dashboard does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import TrainingError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from corral.training.step_metrics import Metrics


class Trackers:
    """The trackers of one stage; started with the first metrics, so that a resumed stage goes on from its step.

    Args:
        names: `tensorboard`, `wandb`, `mlflow`; their packages are there.
        folder: the stage's; TensorBoard's files go below it.
        run: the recipe's name: the project, or experiment, of the other trackers.
        settings: what to record of the stage.
        warn: told of a tracker that is given up.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, run: str, settings: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._names, self._folder, self._run, self._settings, self._warn = names, folder, run, settings, warn
        self._live: dict[str, GeneralTracker] | None = None

    def log(self, metrics: Metrics) -> None:
        """Send one step's figures. Raises: TrainingError (a tracker cannot be started)."""
        if self._live is None:
            self._live = {name: self._start(name, metrics.step) for name in self._names}
        figures = {
            f"train/{k}": v for k, v in asdict(metrics).items() if k not in ("step", "eval_loss") and v is not None
        }
        if metrics.eval_loss is not None:
            figures["eval/loss"] = metrics.eval_loss
        for name, tracker in list(self._live.items()):
            try:
                tracker.log(figures, step=metrics.step)
            except Exception as error:  # whatever a service raises
                self._warn(f"{name} is given up at step {metrics.step}: {error}")
                del self._live[name]

    def finish(self) -> None:
        """Close what is open."""
        for name, tracker in (self._live or {}).items():
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"{name} did not close: {error}")

    def _start(self, name: str, step: int) -> GeneralTracker:
        from accelerate import tracking
        from accelerate.state import PartialState

        PartialState()  # accelerate's logger asks it which process this is
        tracker: Any
        if name == "tensorboard":
            # Steps that are done again after an interruption replace those in the files.
            tracker = tracking.TensorBoardTracker("tensorboard", self._folder, purge_step=step)
        elif name == "wandb":
            tracker = tracking.WandBTracker(self._run, name=self._folder.name, dir=str(self._folder))
        else:
            tracker = tracking.MLflowTracker(self._run, run_name=self._folder.name)
        try:
            tracker.start()
            if step == 0 and name != "tensorboard":  # TensorBoard would make a run of its own of them
                tracker.store_init_configuration(self._settings)
        except Exception as error:
            raise TrainingError(
                f"the tracker {name!r} cannot be started: {error}",
                where="trackers",
                hint=f"set {name} up as its documentation says, or take it out of `trackers`",
            ) from error
        return tracker
