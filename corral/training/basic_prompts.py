"""Basic prompts, which a useful model must be able to answer, and what is wrong with an answer.

Only the form of an answer is judged, not what it says: a model that training broke gives nothing, does not end, repeats
itself, or says the same to everything. `basic_prompts.txt` holds the prompts that ship with corral.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from corral.errors import DataError, TemplateError
from corral.formatting import json_line
from corral.messages import Conversation
from corral.storage import storage_errors

if TYPE_CHECKING:
    from corral.template import Template

ANSWERS_FILE = "basic_prompts.jsonl"
_SHIPPED = Path(__file__).with_name("basic_prompts.txt")
_NGRAM = 4
_SHORTEST_LOOP = 12  # tokens
_FEWEST_EQUAL = 3
_MOST_PROMPTS = 500  # a model of 7 billion weights takes minutes for them on a GPU, at every evaluation


@dataclass(frozen=True, slots=True)
class BasicAnswer:
    """One line of `basic_prompts.jsonl`; the fields' names are its keys.

    Args:
        step: after which it was given.
        fault: what is wrong with it, for people; None if nothing is.
    """

    step: int
    prompt: str
    answer: str
    fault: str | None


def read_basic_prompts(path: str | None, where: str) -> list[str]:
    """The prompts of a text file, one a line and each once; by default those that ship with corral.

    Args:
        where: the setting that names the file.

    Raises: DataError (there is no such file, it is no text, or holds no prompt or too many).
    """
    file = _SHIPPED if path is None else Path(path)
    hint = "name a text file in UTF-8 with one prompt in each line, or remove the setting to take those that ship with corral"
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except OSError as error:
        reason = f"the basic prompts cannot be read: {error.strerror or error}"
        raise DataError(reason, where=f"{where} = {path}", hint=hint) from None
    except ValueError:
        raise DataError("the file of basic prompts is not UTF-8 text", where=f"{where} = {path}", hint=hint) from None
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise DataError("the file of basic prompts holds none", where=f"{where} = {path}", hint=hint)
    if len(prompts) > _MOST_PROMPTS:
        raise DataError(
            f"the file holds {len(prompts):,} basic prompts, and at most {_MOST_PROMPTS} can be answered at each evaluation",
            where=f"{where} = {path}",
            hint="choose some of them: a few dozen show whether a model breaks",
        )
    return prompts


def encode_basic_prompts(
    prompts: Sequence[str], template: Template, context: int | None, max_tokens: int, where: str
) -> dict[str, tuple[int, ...]]:
    """The ids of each prompt.

    Args:
        context: tokens of prompt and answer that the model has room for, if it is known.
        max_tokens: of an answer.

    Raises: DataError (the template refuses one, or there is no room for it with an answer).
    """
    encoded: dict[str, tuple[int, ...]] = {}
    for prompt in prompts:
        problem = None
        try:
            encoded[prompt] = tuple(template.prompt(Conversation.from_turns(("user", prompt))))
        except TemplateError as error:
            problem = f"the template refuses it: {error.what}"
        else:
            length = len(encoded[prompt])
            if context is not None and length + max_tokens > context:
                problem = f"its {length} tokens and {max_tokens} of an answer do not fit into the model's context of {context}"
        if problem:
            hint = "lower `max_tokens` of [train.guards], or name other prompts in its `prompts`"
            raise DataError(f"the basic prompt {prompt[:60]!r} cannot be used: {problem}", where=where, hint=hint)
    return encoded


def find_faults(answers: Sequence[str], ids: Sequence[Sequence[int]], ended: Sequence[bool]) -> list[str | None]:
    """What is wrong with each answer to different prompts.

    An answer is at fault if it is blank, was cut because it did not end, loops (see `is_loop`), or is given, letter for
    letter, to at least three prompts, and either to more than half of them or while there are fewer than half as many
    different answers as prompts.

    Args:
        answers: as text.
        ids: as tokens.
        ended: whether the model ended it.
    """
    texts = [answer.strip() for answer in answers]
    counts = Counter(texts)

    def fault(text: str, tokens: Sequence[int], has_ended: bool) -> str | None:
        if not text:
            return "empty"
        if is_loop(tokens):
            return "in a loop"
        if not has_ended:
            return f"no end after {len(tokens)} tokens"
        if counts[text] >= _FEWEST_EQUAL and 2 * max(counts[text], len(texts) - len(counts)) > len(texts):
            return f"the same answer as to {counts[text] - 1} other prompts"
        return None

    return [fault(*each) for each in zip(texts, ids, ended, strict=True)]


def is_loop(ids: Sequence[int]) -> bool:
    """Whether most of an answer repeats what it said before: it has at least twelve tokens, and of its windows of four
    tokens more than half occurred before in it. One pass over the tokens."""
    if len(ids) < _SHORTEST_LOOP:
        return False
    windows = list(zip(*(islice(ids, start, None) for start in range(_NGRAM)), strict=False))
    return 2 * len(set(windows)) < len(windows)


def append_answers(folder: Path, answers: Sequence[BasicAnswer]) -> None:
    """Add answers to a stage's `basic_prompts.jsonl`. Raises: StorageError."""
    path = folder / ANSWERS_FILE
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.writelines(json_line(asdict(answer)) for answer in answers)
