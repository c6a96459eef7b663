"""Sends the metrics of a training stage to TensorBoard, Weights & Biases or MLflow, through accelerate's trackers.

A tracker that fails during a stage is dropped with a warning; training continues.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import TrainingError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from corral.training.step_metrics import StepMetrics


class Trackers:
    """The trackers of one stage, started with the first metrics, so that a resumed stage continues at its step.

    Args:
        names: `tensorboard`, `wandb`, `mlflow`; their packages are installed.
        folder: the stage's; TensorBoard's files go below it.
        run: the recipe's name, used as project or experiment of the other trackers.
        settings: of the stage, to record.
        warn: called with a message when a tracker is dropped.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, run: str, settings: dict[str, Any], warn: Callable[[str], None]
    ) -> None:
        self._names, self._folder, self._run, self._settings, self._warn = names, folder, run, settings, warn
        self._active: dict[str, GeneralTracker] | None = None

    def log(self, metrics: StepMetrics) -> None:
        """Send one step's metrics. Raises: TrainingError (a tracker cannot be started)."""
        if self._active is None:
            self._active = {name: self._start(name, metrics.step) for name in self._names}
        values = {
            f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
            for key, value in metrics.to_json().items()
            if key != "step" and value is not None
        }
        for name, tracker in list(self._active.items()):
            try:
                tracker.log(values, step=metrics.step)
            except Exception as error:  # whatever a service raises
                self._warn(f"{name} failed at step {metrics.step} and gets no more metrics: {error}")
                del self._active[name]

    def finish(self) -> None:
        """Close the trackers that are open."""
        for name, tracker in (self._active or {}).items():
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"{name} did not close: {error}")

    def _start(self, name: str, step: int) -> GeneralTracker:
        from accelerate import tracking
        from accelerate.state import PartialState

        PartialState()  # accelerate's logger reads the process index from it
        tracker: Any
        if name == "tensorboard":
            # Steps that are repeated after an interruption replace those in the files.
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
                hint=f"set {name} up as its documentation says, or remove it from `trackers`",
            ) from error
        return tracker
