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

from corral.errors import CheckpointError, GateError
from corral.formatting import count_of, round_up
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
        prompts: the basic prompts that it was asked, and the stage goes on with.
        answered: those that it answered well.
    """

    logprob_chosen: float | None
    rows: tuple[float, ...]
    prompts: tuple[str, ...]
    answered: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path) -> Start:
        """Of a stage that has begun. Raises: CheckpointError (the file is missing or damaged)."""
        path = folder / FILE
        try:
            found: Any = json.loads(path.read_text("utf-8"))
            chosen = found["logprob_chosen"]
            return cls(
                None if chosen is None else float(chosen),
                tuple(map(float, found["rows"])),
                tuple(map(str, found["prompts"])),
                tuple(map(str, found["answered"])),
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                "the guards cannot compare the model with what it gave before the first step: the file of that is "
                + ("missing" if isinstance(error, FileNotFoundError) else "damaged"),
                where=str(path),
                hint="copy that file again, or remove the folder `checkpoints` of this stage: it then begins again",
            ) from None


class StageGuards:
    """The guards of one stage.

    Args:
        config: the stage's settings, with `guards`.
        number: of the stage, from 1.
        template: which the prompts are asked with.
        context: tokens of prompt and answer that the model has room for.
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
        context: int,
        tolerance: float,
        folder: Path,
        world: World | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        assert config.guards is not None
        self.config, self.limits, self.number, self.folder = config, config.guards, number, folder
        self._template, self._tolerance, self._world, self._say = template, tolerance, world or World(), say
        self._context, self._where = context, f"train.{number - 1}.guards"
        self._prompts = self._encode(basic_prompts.read_basic_prompts(self.limits.prompts, f"{self._where}.prompts"))
        self._start: Start | None = None

    def begin(self, objective: Objective, sides: dict[str, Sequence[Example]], scorer: Scorer) -> None:
        """Check the reference, before the first step. All processes must call it. Raises: as `check_reference`."""
        check_reference(objective, sides, scorer, self._tolerance, self.folder / "reference")

    def resume(self) -> None:
        """Read what the model gave before the first step, of a stage that goes on. All processes must call it.

        Raises: CheckpointError (that is missing or damaged), DataError (the basic prompts of then cannot be used).
        """
        self._start = self._world.broadcast(Start.read(self.folder) if self._world.is_main else None)
        assert self._start is not None
        if set(self._start.prompts) != set(self._prompts):
            self._say(
                f"`{self._where}.prompts` names other basic prompts than when this stage began: it goes on with those of "
                f"then ({self.folder / FILE}), with whose answers it is compared"
            )
            self._prompts = self._encode(self._start.prompts)

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
        answers: list[BasicAnswer] = []
        if step == 0:
            self._start = self._measure_start(chosen, rows, scorer)
        else:
            answers = self._ask(step, self._begun.answered, self.limits.max_tokens, scorer)
        start = self._begun
        figures: dict[str, float] = {}
        if chosen is not None and start.logprob_chosen is not None:
            figures[FALL] = relative_fall(start.logprob_chosen, chosen)
        if start.answered:
            figures[PASSED] = len(start.answered) - sum(answer.fault is not None for answer in answers)
        return figures, self._verdict(step, objective, rows, figures.get(FALL, 0.0), chosen, answers, scorer)

    def figures(self, step: int) -> dict[str, float | None]:
        """What the check after a step measured: `chosen_fall`, `basic_prompts_passed` of `basic_prompts`, and
        `logprob_chosen_before`; None for what could not be measured."""
        line = step_metrics.read_step(self.folder, step)
        return {
            FALL: line.get(FALL),
            PASSED: line.get(PASSED),
            "basic_prompts": len(self._begun.answered),
            "logprob_chosen_before": self._begun.logprob_chosen,
        }

    @property
    def _begun(self) -> Start:
        """What was measured before the first step."""
        assert self._start is not None, "neither checked before the first step nor resumed"
        return self._start

    def _encode(self, prompts: Sequence[str]) -> dict[str, tuple[int, ...]]:
        where = f"{self._where}.prompts"
        return basic_prompts.encode_basic_prompts(prompts, self._template, self._context, self.limits.max_tokens, where)

    def _measure_start(self, chosen: float | None, rows: Sequence[Example], scorer: Scorer) -> Start:
        tokens = self.limits.max_tokens // 2
        answers = self._ask(0, list(self._prompts), tokens, scorer)
        good = tuple(answer.prompt for answer in answers if not answer.fault)
        referenced = [row for row in rows if isinstance(row, ReferencedExample)]
        sums = [row.reference for row in referenced] if len(referenced) == len(rows) else scorer.sums(rows)
        start = Start(chosen, tuple(values[0] for values in sums), tuple(self._prompts), good)
        if self._world.is_main:
            write_json(self.folder / FILE, asdict(start))
        watched = "only these are asked again" if good else "so these cannot tell whether training breaks it"
        self._say(
            f"the model that this stage starts from answers {len(good) or 'none'} of {len(answers)} basic prompts well, in "
            f"up to {tokens} tokens: {watched} ({self.folder / basic_prompts.ANSWERS_FILE})"
        )
        if chosen is None:
            self._say(
                f"none of the {count_of(len(rows), 'row')} that this stage is evaluated on has a good answer, so "
                "`guards.chosen_fall` watches nothing: hold out rows with good answers"
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
        fall: float,
        chosen: float | None,
        answers: Sequence[BasicAnswer],
        scorer: Scorer,
    ) -> GateError | None:
        limits, before = self.limits, self._begun.logprob_chosen
        problems: list[str] = []
        places: list[str] = []
        accepting: list[str | None] = []
        if fall > limits.chosen_fall:
            problems.append(
                f"chosen answers have become less likely: their mean log-probability fell by {fall:.0%} of its size, from "
                f"{before:.1f} to {chosen:.1f} (guards.chosen_fall = {limits.chosen_fall:g})"
            )
            places.append(f"rows that fell most: {self._fallen(objective, rows, scorer)}")
            accepting.append(f"chosen_fall={round_up(fall)}")
        faulty = [answer for answer in answers if answer.fault]
        if not limits.allows_failing(len(faulty), len(answers)):
            problems.append(
                f"{len(faulty)} of {len(answers)} basic prompts are answered badly, which the model answered well before "
                f"(guards.failing_prompts = {limits.failing_prompts:g})"
            )
            shown = [f"{a.prompt!r}: {a.fault}, {_beginning(a.answer)}" for a in faulty[:_LISTED]]
            more = f" and {len(faulty) - _LISTED} more in {basic_prompts.ANSWERS_FILE}" if len(faulty) > _LISTED else ""
            places.append("; ".join(shown) + more)
            share = round_up(len(faulty) / len(answers))
            accepting.append(f"failing_prompts={share}" if float(share) < 1 else None)
        if not problems:
            return None
        return GateError(
            f"stopped after step {step}, as training breaks the model: {'; '.join(problems)}",
            where="; ".join(places),
            hint=self._advice(accepting),
        )

    def _fallen(self, objective: Objective, rows: Sequence[Example], scorer: Scorer) -> str:
        """The rows whose chosen or good answers fell most."""
        now = scorer.sums(rows)
        falls = [
            (values[0] - before, before, values[0], row)
            for row, values, before in zip(rows, now, self._begun.rows, strict=False)
            if objective.is_good(row)
        ]
        falls.sort(key=lambda fall: fall[0])
        return ", ".join(
            f"{row.source} row {row.index} ({before:.1f} → {after:.1f})" for _, before, after, row in falls[:_LISTED]
        )

    def _advice(self, accepting: Sequence[str | None]) -> str:
        """What to do instead.

        Args:
            accepting: settings of the guards that would accept what was seen; None for what none accepts.
        """
        config, key = self.config, f"train.{self.number - 1}"
        kept = "merged" if config.method == "full" else "adapter"
        ways = [f"--set {key}.optimizer.lr={config.optimizer.lr / 4:.2g} (it is {config.optimizer.lr:.2g})"]
        if config.dpo is not None and config.dpo.sft_weight < 0.2:
            ways.append(f"--set {key}.dpo.sft_weight=0.2 (it is {config.dpo.sft_weight:g})")
        if config.objective in ("dpo", "kto", "ulma"):
            beta = getattr(config, config.objective).beta
            ways.append(f"a larger {config.objective}.beta, which holds it nearer to the reference (it is {beta:g})")
        if None not in accepting:
            ways.append(f"go on from here with {' '.join(f'--set {key}.guards.{setting}' for setting in accepting)}")
        return (
            f"the last good weights are in {self.folder / kept}, which is not promoted; train it again with less: "
            + ", or ".join(ways)
        )


def relative_fall(before: float, after: float) -> float:
    """By how much a log-probability fell, as a share of its size before, which counts as at least one nat; negative if it
    rose."""
    return (before - after) / max(abs(before), _SMALLEST_SIZE)


def _beginning(answer: str) -> str:
    return repr(answer if len(answer) <= _SHOWN else f"{answer[:_SHOWN]}…")
