"""The rows of one training stage: of the sources that it names, and of the record types that its objective takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corral.errors import DataError
from corral.messages import RECORD_TYPES, Conversation, Feedback, Preference, Record, Text
from corral.training.mismatched_rows import MismatchedRows
from corral.training.objective_table import TAKES
from corral.training.single_answers import SingleAnswers

if TYPE_CHECKING:
    from corral.data.example_store import ExampleStore, SizedExamples
    from corral.data.prepare import Prepared
    from corral.recipe import Train

_CONTENT: dict[type[Record], str] = {
    Conversation: "a conversation",
    Preference: "a better and a worse answer",
    Feedback: "an answer with a score",
    Text: "a document",
}


@dataclass(frozen=True)
class StageRows:
    """The rows that a stage trains on, and those that it is evaluated on, with the sequences that its objective reads."""

    train: SizedExamples
    validation: SizedExamples

    @classmethod
    def select(cls, prepared: Prepared, stage: Train, number: int) -> StageRows:
        """The rows of training stage `number` (from 1). Raises DataError if there are none to train on."""
        takes = TAKES[stage.objective]
        train, validation = (side.select(stage.sources, takes) for side in (prepared.train, prepared.validation))
        if not len(train):
            place = "" if stage.sources is None else f" in {', '.join(stage.sources)}"
            raise DataError(
                f"training stage {number} has no row to train on: `{stage.objective}` takes {_contents(takes)}, and there is "
                f"none on the training side{place}",
                where=f"train.{number - 1}",
                hint="name other sources in its `sources`, or give them a `format` that makes such rows; the ledger says "
                "what became of every row",
            )
        needed_for = "early_stopping" if stage.early_stopping else 'merge = "best"' if stage.merge == "best" else None
        if needed_for and not len(validation):
            raise DataError(
                f"training stage {number} has no validation row, and its `{needed_for}` needs some",
                where=f"train.{number - 1}",
                hint='name a source with `side = "validation"` in its `sources`, or raise data.split.validation',
            )
        return cls(_arrange(train, stage, number, "training"), _arrange(validation, stage, number, "validation"))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that a pass with gradients reads, those for validation included."""
        return [*self.train.loss_lengths.tolist(), *self.validation.loss_lengths.tolist()]

    @property
    def digest(self) -> str:
        """What training on these rows depends on: both sides' content, in order."""
        return f"{self.train.digest} {self.validation.digest}"


def _arrange(rows: ExampleStore, stage: Train, number: int, side: str) -> SizedExamples:
    """The rows as the stage's objective takes them. Raises DataError."""
    if Feedback not in TAKES[stage.objective] or not len(rows):
        return rows
    answers = SingleAnswers(rows, rows.sequence_figures())
    if not len(answers):
        raise DataError(
            f"training stage {number} has no {side} row: each of the {answers.contradictory} answers is chosen in one pair "
            "and rejected in another",
            where=f"train.{number - 1}",
            hint="correct the pairs, give the answers scores, or use an objective of pairs, such as `dpo`",
        )
    if side == "training":
        _check_classes(answers, stage, number)
    if stage.objective != "kto":
        return answers
    if len(set(answers.prompts.tolist())) == 1:
        raise DataError(
            f"all {side} rows of training stage {number} have one prompt, and KTO's KL needs answers to other prompts",
            where=f"train.{number - 1}",
            hint='add rows (`data.split` says how many are held out), or use `objective = "ulma"`',
        )
    return MismatchedRows(answers)


def _check_classes(answers: SingleAnswers, stage: Train, number: int) -> None:
    """Raises DataError if all answers are good, or all are bad."""
    judgements = (isinstance(e.record, Feedback) and e.record.score >= stage.threshold for e in answers)
    first = next(judgements)
    if all(judgement == first for judgement in judgements):
        raise DataError(
            f"all {len(answers):,} answers of training stage {number} are {'good' if first else 'bad'}: their scores are "
            f"{'at least' if first else 'below'} {stage.threshold:g}, and `{stage.objective}` learns from good and bad ones",
            where=f"train.{number - 1}.{stage.objective}.threshold",
            hint="set the `threshold` between the scores, add rows of the other kind, or train on good answers alone as "
            'conversations, with `objective` = "sft"',
        )


def check_rows_taken(prepared: Prepared, stages: Sequence[Train]) -> None:
    """Raises DataError if no stage takes some row on the training side, or a stage has none to train on."""
    for kind in RECORD_TYPES:
        takers = [stage for stage in stages if kind in TAKES[stage.objective]]
        if any(stage.sources is None for stage in takers):
            continue
        named = {label for stage in takers for label in stage.sources or ()}
        rows = prepared.train.select(types=[kind])
        if len(rows) > len(rows.select(named)):
            row = next(row for row in rows if row.source not in named)
            taken = "; ".join(f"`{name}` takes {_contents(TAKES[name])}" for name in _objectives(stages))
            raise DataError(
                f"row {row.index} holds {_CONTENT[kind]}, and no training stage takes it: {taken}",
                where=row.source,
                hint=f"add a stage whose `objective` takes such rows ({_takers(kind)}), or give the source a format that "
                'makes conversations of them (of pairs: format = "chosen-answer")',
            )
    for number, stage in enumerate(stages, 1):
        StageRows.select(prepared, stage, number)


def _objectives(stages: Sequence[Train]) -> list[str]:
    return list(dict.fromkeys(stage.objective for stage in stages))


def _takers(kind: type[Record]) -> str:
    """The objectives that take rows of this type."""
    return ", ".join(name for name, types in TAKES.items() if kind in types)


def _contents(types: Sequence[type[Record]]) -> str:
    return " or ".join(_CONTENT[each] for each in types)
