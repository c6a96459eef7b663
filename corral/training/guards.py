"""What stops a stage that aligns a model before it leaves a broken one; `recipe.alignment.Guards` has the limits.

At each evaluation, before its weights are kept as the best so far:

- How far the mean log-probability of chosen (or good) answers has fallen since before the first step, in evaluation mode: on
  the held-out rows. Without any, on some of the training rows, always the same ones. These are less likely to fall than other
  rows, as the stage trains on them; so hold rows out where you can.
- Whether the model still answers basic prompts (see `basic_prompts`): those that it answered well before the first step,
  within half of the tokens, so that an answer may grow before it counts as one without an end.

What the model gave before the first step is in `guards.json`, the answers of every check in `basic_prompts.jsonl`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import GateError
from corral.storage import write_json
from corral.training import basic_prompts, step_metrics
from corral.training.basic_prompts import BasicAnswer
from corral.training.distributed import World
from corral.training.reference_logprobs import ReferencedExample
from corral.training.start_checks import check_reference

if TYPE_CHECKING:
    from corral.data.example_store import Example
    from corral.recipe import Train
    from corral.template import Template
    from corral.training.objectives import Objective
    from corral.training.scorer import Scorer

FILE = "guards.json"
FALL, PASSED = "chosen_fall", "basic_prompts_passed"
"""Metrics of a check."""
_SMALLEST_SIZE = 1.0  # nats: smaller log-probabilities are those of answers that are all but certain
_LISTED = 4
_SHOWN = 60  # characters


@dataclass(frozen=True, slots=True)
class Start:
    """What the model gave before the first step; the fields' names are the keys of `guards.json`.

    Args:
        logprob_chosen: mean log-probability of the chosen or good answers; None if no row has one.
        rows: that of the first answer of each row, in order.
        prompts: the basic prompts that it answered well.
        asked: how many there are.
    """

    logprob_chosen: float | None
    rows: tuple[float, ...]
    prompts: tuple[str, ...]
    asked: int


class StageGuards:
    """The guards of one stage.

    Args:
        config: the stage's settings, with `guards`.
        number: of the stage, from 1.
        template: which the prompts are asked with.
        longest: tokens of prompt and answer that the model has room for.
        tolerance: see `reference_tolerance`.
        folder: the stage's.
        world: the processes that train together.
        say: called with what the user should know.

    Raises: DataError (the basic prompts cannot be used).
    """

    def __init__(
        self,
        config: Train,
        number: int,
        template: Template,
        *,
        longest: int,
        tolerance: float,
        folder: Path,
        world: World | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        assert config.guards is not None
        self.config, self.limits, self.number, self.folder = config, config.guards, number, folder
        self._template, self._tolerance, self._world, self._say = template, tolerance, world or World(), say
        where = f"train.{number - 1}.guards"
        prompts = basic_prompts.read_basic_prompts(self.limits.prompts, f"{where}.prompts")
        room = longest - self.limits.max_tokens
        self._prompts = basic_prompts.encode_basic_prompts(prompts, template, room, f"{where}.prompts")
        self._start: Start | None = None

    def begin(self, objective: Objective, sides: dict[str, Sequence[Example]], scorer: Scorer) -> None:
        """Check the reference, before the first step. All processes must call it. Raises: as `check_reference`."""
        check_reference(objective, sides, scorer, self._tolerance, self.folder / "reference")

    def check(
        self, step: int, objective: Objective, rows: Sequence[Example], metrics: Mapping[str, float], scorer: Scorer
    ) -> tuple[dict[str, float], GateError | None]:
        """Measure the model as it is after a step; at step 0, what it is compared with later. All processes must call it.

        Args:
            rows: on which the objective was evaluated.
            metrics: of the objective on them.

        Returns: figures for `metrics.jsonl`, and what to raise if the stage must stop.
        """
        if self._world.is_main:
            step_metrics.truncate_from(self.folder / basic_prompts.ANSWERS_FILE, step)
        chosen = metrics.get("logprob_chosen")
        if step == 0:
            self._start = self._measure_start(chosen, rows, scorer)
            answers = []
        else:
            answers = self._ask(step, self._start_prompts, self.limits.max_tokens, scorer)
        start = self._read_start()
        if start is None:
            return {}, None
        figures: dict[str, float] = {}
        if chosen is not None and start.logprob_chosen is not None:
            figures[FALL] = relative_fall(start.logprob_chosen, chosen)
        if start.prompts:
            faulty = [answer for answer in answers if answer.fault]
            figures[PASSED] = len(self._start_prompts) - len(faulty)
        return figures, self._verdict(step, objective, rows, chosen, answers, scorer)

    def figures(self, step: int) -> dict[str, float | None]:
        """What the check after a step measured: `chosen_fall`, `basic_prompts_passed` of `basic_prompts`, and
        `logprob_chosen_before`; None for what could not be measured."""
        start, line = self._read_start(), step_metrics.read_step(self.folder, step)
        return {
            FALL: line.get(FALL),
            PASSED: line.get(PASSED),
            "basic_prompts": len(self._start_prompts) if start else None,
            "logprob_chosen_before": start.logprob_chosen if start else None,
        }

    @property
    def _start_prompts(self) -> list[str]:
        """The prompts that count: answered well before the first step, and still asked for."""
        start = self._read_start()
        return [prompt for prompt in start.prompts if prompt in self._prompts] if start else []

    def _read_start(self) -> Start | None:
        """What was measured before the first step; None if the stage began without guards."""
        if self._start is None:
            path = self.folder / FILE
            found: Any = json.loads(path.read_text("utf-8")) if self._world.is_main and path.is_file() else None
            found = self._world.broadcast(found)
            if found is None:
                return None
            self._start = Start(**found | {"rows": tuple(found["rows"]), "prompts": tuple(found["prompts"])})
        return self._start

    def _measure_start(self, chosen: float | None, rows: Sequence[Example], scorer: Scorer) -> Start:
        answers = self._ask(0, list(self._prompts), self.limits.max_tokens // 2, scorer)
        good = tuple(answer.prompt for answer in answers if not answer.fault)
        referenced = [row for row in rows if isinstance(row, ReferencedExample)]
        sums = [row.reference for row in referenced] if len(referenced) == len(rows) else scorer.sums(rows)
        start = Start(chosen, tuple(values[0] for values in sums), good, len(answers))
        if self._world.is_main:
            write_json(self.folder / FILE, asdict(start))
        if not good:
            self._say(
                f"the model that this stage starts from answers none of {len(answers)} basic prompts well, so these cannot "
                f"tell whether training breaks it ({self.folder / basic_prompts.ANSWERS_FILE})"
            )
        return start

    def _ask(self, step: int, prompts: Sequence[str], max_tokens: int, scorer: Scorer) -> list[BasicAnswer]:
        """The model's answers, which are added to their file."""
        if not prompts:
            return []
        ids = [self._prompts[prompt] for prompt in prompts]
        completions = scorer.answer(ids, self._template.stop_ids, max_tokens)
        texts = [self._template.decode(completion.ids) for completion in completions]
        faults = basic_prompts.find_faults(texts, [c.ids for c in completions], [c.ended for c in completions])
        answers = [BasicAnswer(step, *each) for each in zip(prompts, texts, faults, strict=True)]
        if self._world.is_main:
            basic_prompts.append_answers(self.folder, answers)
        return answers

    def _verdict(
        self,
        step: int,
        objective: Objective,
        rows: Sequence[Example],
        chosen: float | None,
        answers: Sequence[BasicAnswer],
        scorer: Scorer,
    ) -> GateError | None:
        start, limits = self._read_start(), self.limits
        assert start is not None
        problems: list[str] = []
        places: list[str] = []
        settings: list[str] = []
        before = start.logprob_chosen
        if chosen is not None and before is not None and (fall := relative_fall(before, chosen)) > limits.chosen_fall:
            problems.append(
                f"chosen answers have become less likely: their mean log-probability fell by {fall:.0%}, from {before:.1f} to "
                f"{chosen:.1f} (at most {limits.chosen_fall:.0%})"
            )
            places.append(f"rows that fell most: {self._fallen(objective, rows, start, scorer)}")
            settings.append("chosen_fall")
        faulty = [answer for answer in answers if answer.fault]
        if len(faulty) > limits.failing_prompts * len(answers):
            problems.append(
                f"{len(faulty)} of {len(answers)} basic prompts are answered badly, which the model answered well before (at "
                f"most {limits.failing_prompts:.0%})"
            )
            shown = [f"{a.prompt!r}: {a.fault}, {_beginning(a.answer)}" for a in faulty[:_LISTED]]
            more = f" and {len(faulty) - _LISTED} more in {basic_prompts.ANSWERS_FILE}" if len(faulty) > _LISTED else ""
            places.append("; ".join(shown) + more)
            settings.append("failing_prompts")
        if not problems:
            return None
        return GateError(
            f"stopped after step {step}, as training breaks the model: {'; '.join(problems)}",
            where="\n         ".join(places),
            hint=self._advice(settings),
        )

    def _fallen(self, objective: Objective, rows: Sequence[Example], start: Start, scorer: Scorer) -> str:
        """The rows whose chosen or good answers fell most."""
        now = scorer.sums(rows)
        falls = [
            (values[0] - before, before, values[0], row)
            for row, values, before in zip(rows, now, start.rows, strict=False)
            if objective.is_good(row)
        ]
        falls.sort(key=lambda fall: fall[0])
        return ", ".join(
            f"{row.source} row {row.index} ({before:.1f} → {after:.1f})" for _, before, after, row in falls[:_LISTED]
        )

    def _advice(self, settings: Sequence[str]) -> str:
        config, key = self.config, f"train.{self.number - 1}"
        kept = "merged" if config.method == "full" else "adapter"
        ways = [f"--set {key}.optimizer.lr={config.optimizer.lr / 4:.2g} (it is {config.optimizer.lr:.2g})"]
        if config.dpo is not None and config.dpo.sft_weight < 0.2:
            ways.append(f"--set {key}.dpo.sft_weight=0.2 (it is {config.dpo.sft_weight:g})")
        if config.objective in ("dpo", "kto", "ulma"):
            beta = getattr(config, config.objective).beta
            ways.append(f"a larger {config.objective}.beta, which holds it nearer to the reference (it is {beta:g})")
        limits = " and ".join(f"`{name}`" for name in settings)
        return (
            f"train it again with less: {', or '.join(ways)}. To go on from here instead, raise {limits} in [train.guards]. "
            f"The last good weights are in {self.folder / kept}; the run's model stays the one that it was"
        )


def relative_fall(before: float, after: float) -> float:
    """By how much a log-probability fell, as a share of its size before, which counts as at least one nat; negative if it
    rose."""
    return (before - after) / max(abs(before), _SMALLEST_SIZE)


def _beginning(answer: str) -> str:
    return repr(answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}…")
