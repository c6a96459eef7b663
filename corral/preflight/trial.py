"""The child process of a trial: a few real steps of a training stage, measured, and the last one again after `kill -9`.

The child runs the training loop of a real run on chosen rows, in a folder that is deleted afterwards. It reports its phase
over a pipe, so that the parent can say where it ended. If its memory grows past the limit, it exits before the machine
runs out.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from corral.data.prepare import Prepared
from corral.errors import CorralError, out_of_memory_reason
from corral.export import contract
from corral.formatting import format_bytes
from corral.model import adapters
from corral.model.naming import ModelFiles
from corral.recipe import Recipe
from corral.storage import new_directory
from corral.system import peak_memory
from corral.training import trained_model
from corral.training.loop import Trainer
from corral.training.objective_table import build_objective
from corral.training.sampler import BatchSampler
from corral.training.stage_rows import StageRows

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from corral.training.step_metrics import StepMetrics
    from corral.training.trained_model import TrainingSetup

HEAVY_STEP, TYPICAL_STEP = 1, 2
"""The steps of a trial: the longest packs, then typical ones. A checkpoint is written between them."""
_WATCH_INTERVAL = 0.02  # seconds


@dataclass(frozen=True, slots=True)
class TrialJob:
    """What a trial computes.

    Args:
        start: the model and the stage's settings.
        recipe: its template and the name of its base are used.
        prepared: the folder of prepared rows.
        heavy: rows of the first step, which make the longest packs.
        typical: rows of the second step.
        held_out: validation rows for the evaluation before the first step.
        number: of the stage, from 1.
        seed: the stage's.
        folder: where the trial writes.
        limit: bytes of memory at which it exits; None for a GPU, which refuses by itself.
    """

    start: TrainingSetup
    recipe: Recipe
    prepared: Path
    heavy: tuple[int, ...]
    typical: tuple[int, ...]
    held_out: tuple[int, ...]
    number: int
    seed: int
    folder: Path
    limit: int | None


def run_trial(job: TrialJob, pipe: Connection, resume: bool) -> None:
    """Run in the child. Sends `("phase", text)`, then `("result", figures)`, `("memory", text)` or `("error", error)`.

    Without `resume` it kills itself after sending its result, before the last step has a checkpoint.
    """
    output = os.open(job.folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    with contextlib.suppress(OSError):  # if memory runs out after all, the kernel kills this process first
        Path("/proc/self/oom_score_adj").write_text("1000")
    lock = threading.Lock()

    def send(kind: str, value: Any) -> None:
        with lock:
            pipe.send((kind, value))

    memory = _MemoryWatch(job.start.device, job.limit, send)
    try:
        _Trial(job, send, memory, resume).run()
    except CorralError as error:
        send("error", error)
    except (MemoryError, RuntimeError) as error:
        reason = out_of_memory_reason(error)
        if reason is None:
            raise
        send("memory", reason)


class _MemoryWatch:
    """The most memory that a trial has used since `reset`. On a CPU, exits above a limit: the machine must not run out.

    Memory of files that are mapped is left out, as the system takes it back when memory is wanted.
    """

    def __init__(self, device: str, limit: int | None, send: Callable[[str, Any], None]) -> None:
        self._cuda, self._limit, self._send, self._peak, self._context = device == "cuda", limit, send, 0, 0
        if self._cuda:
            free = torch.cuda.mem_get_info()[0]
            torch.zeros(1, device="cuda")
            self._context = max(0, free - torch.cuda.mem_get_info()[0])
        else:
            threading.Thread(target=self._watch, daemon=True).start()

    def reset(self) -> None:
        """Start a new peak."""
        self._peak = 0
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_reserved() + self._context if self._cuda else max(self._peak, _resident_bytes())

    def _watch(self) -> None:
        while self._limit is None or (used := _resident_bytes()) < self._limit:
            self._peak = max(self._peak, _resident_bytes())
            time.sleep(_WATCH_INTERVAL)
        self._send("memory", f"it had grown to {format_bytes(used)}")
        os._exit(1)


def _resident_bytes() -> int:
    """Memory that this process holds now, mapped files left out; where not on Linux, the most it ever held."""
    try:
        pages, shared = Path("/proc/self/statm").read_text().split()[1:3]
    except OSError:
        return peak_memory() or 0
    return (int(pages) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class _Trial:
    def __init__(self, job: TrialJob, send: Callable[[str, Any], None], memory: _MemoryWatch, resume: bool) -> None:
        self._job, self._send, self._memory, self._resume = job, send, memory, resume
        self._figures: dict[str, Any] = {}
        self._phase_start = self._optimizer_start = 0.0

    def run(self) -> None:
        """Runs the trial and ends this process."""
        self._phase("Loading the model again, after kill -9" if self._resume else "Loading the model")
        self._training = self._build()
        self._training.prepare_reference()
        self._memory.reset()
        optimizer = self._training.optimizer
        optimizer.register_step_pre_hook(self._before_optimizer)
        optimizer.register_step_post_hook(self._after_optimizer)
        if self._resume:
            self._phase("Going on from the checkpoint")
        else:
            self._phase("Evaluating" if self._job.held_out else "Training on the longest rows")
        self._phase_start = time.perf_counter()
        self._training.run(on_step=self._on_step, should_stop=self._should_stop)

    def _phase(self, text: str) -> None:
        self._send("phase", text)

    def _build(self) -> Trainer:
        job, start = self._job, self._job.start
        rows = StageRows.select(Prepared.open(job.prepared), start.config, job.number)
        template = ModelFiles(start.folder, start.adapter, job.recipe).load_template()
        probes = contract.make_probes(template)
        trained: Any = trained_model.load_trainable(start, template, seed=job.seed)
        config = start.config.model_copy(update={"checkpoint_every": 1, "evaluate_every": 10**9})
        assert isinstance(config.pack_length, int)

        # Only these, since an objective may need log-probabilities of all that it is given.
        chosen = list(dict.fromkeys((*job.heavy, *job.typical)))

        class TrialSampler(BatchSampler):
            """The chosen rows of the first two steps."""

            def batch(self, step: int) -> list[int]:
                return [chosen.index(row) for row in (job.heavy if step == HEAVY_STEP else job.typical)]

        def save() -> None:
            began = time.perf_counter()
            if start.config.method == "full":
                scores = training.score([p.ids for p in probes], [p.start for p in probes])
                trained_model.save_full_model(trained, training.weights(), scores, start, job.folder, template, [])
            else:
                with new_directory(job.folder / trained_model.ADAPTER_FOLDER) as folder:
                    adapters.save(trained, folder, base=job.recipe.model.base)
                    template.save(folder)
            self._figures["save_seconds"] = time.perf_counter() - began

        training = Trainer(
            trained,
            [rows.train[i] for i in chosen],
            [rows.validation[i] for i in job.held_out],
            build_objective(config),
            config,
            pack_length=config.pack_length,
            seed=job.seed,
            folder=job.folder,
            save_best=save,
        )
        training.sampler = TrialSampler(config, rows.train.lengths.tolist(), job.seed)
        training.total_steps = max(TYPICAL_STEP + 1, training.total_steps)  # the stage's last step would evaluate
        return training

    def _before_optimizer(self, *_: Any) -> None:
        self._optimizer_start = self._now()

    def _after_optimizer(self, *_: Any) -> None:
        self._figures["optimizer_seconds"] = self._now() - self._optimizer_start

    def _now(self) -> float:
        if self._job.start.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _on_step(self, metrics: StepMetrics) -> None:
        now, figures = time.perf_counter(), self._figures
        if metrics.step == 0:
            figures["evaluate_seconds"] = now - self._phase_start
            self._phase("Training on the longest rows")
        elif metrics.step == HEAVY_STEP:
            figures["heavy_seconds"] = metrics.seconds
            self._phase_start = now
        else:
            training = self._training
            step = metrics.seconds - figures.get("heavy_seconds", metrics.seconds)
            checkpoint = self._job.folder / "checkpoints" / f"step-{HEAVY_STEP:06d}"
            figures |= {
                "typical_rate": metrics.tokens_per_second,
                "checkpoint_seconds": now - self._phase_start - step,
                "peak": self._memory.peak(),
                "loss": metrics.loss,
                "digest": _state_hash(training),
                "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.iterdir()),
            }
            self._send("result", figures)
            if not self._resume:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(0)

    def _should_stop(self) -> bool:
        """Called between a step and its checkpoint."""
        self._phase("Writing a checkpoint, then training on typical rows")
        return False


def _state_hash(training: Trainer) -> str:
    """sha256 of the trained weights and the optimizer's state."""
    digest = hashlib.sha256()
    for name, parameter in training.parameters.items():
        digest.update(name.encode())
        state: dict[str, Any] = training.optimizer.state[parameter]
        for value in (parameter, *(state[key] for key in sorted(state))):
            if isinstance(value, torch.Tensor):
                data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(data.numpy().data)
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
