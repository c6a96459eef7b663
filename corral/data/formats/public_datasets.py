"""The table of public data sets: their names on the hub, their columns, and how their rows become records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from corral.data.formats.chat_messages import hh_chosen, sharegpt
from corral.data.formats.fields import (
    Format,
    FormatError,
    describe_type,
    format_path,
    nonblank_text,
    optional_column_text,
    value_at_path,
)
from corral.data.formats.multiple_choice import multiple_choice
from corral.data.formats.preferences import preference
from corral.data.formats.prompt_response import alpaca
from corral.data.formats.wikibooks import wikibooks_recipes
from corral.messages import Conversation, Record, with_input

_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, slots=True)
class RequestAnswer:
    """A format of a request and its answer, each a path to a text, and perhaps a column with context for the request."""

    request: tuple[str, ...]
    answer: tuple[str, ...]
    context: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """The record of a row. Raises FormatError."""
        request = _text_at(row, *self.request)
        if self.context is not None:
            request = with_input(request, optional_column_text(row, self.context))
        return Conversation.from_turns(("user", request), ("assistant", _text_at(row, *self.answer)))


@dataclass(frozen=True, slots=True)
class PublicDataset:
    """A public data set.

    Args:
        hub_ids: its names on the hub.
        columns: all its columns there.
        read: turns a row into a record.
    """

    hub_ids: tuple[str, ...]
    columns: tuple[str, ...]
    read: Format

    def __call__(self, row: Mapping[str, Any]) -> Record:
        """The record of a row. Raises FormatError."""
        return self.read(row)


def gsm8k(row: Mapping[str, Any]) -> Conversation:
    """A school maths problem with a solution that ends in `#### 42`; calculator marks (`<<6*7=42>>`) are removed.

    Raises FormatError if a text is missing.
    """
    question, answer = _text_at(row, "question"), _text_at(row, "answer")
    return Conversation.from_turns(
        ("user", question), ("assistant", nonblank_text(_CALCULATOR.sub("", answer), "answer"))
    )


def hotpot(row: Mapping[str, Any]) -> Conversation:
    """A question with the passages needed to answer it; the other eight or so are left out, as they would not fit.

    Raises FormatError if `context` has none of the passages that `supporting_facts` names, or a text is missing.
    """
    question, answer = _text_at(row, "question"), _text_at(row, "answer")
    titles = _list(value_at_path(row, ("context", "title")), "context.title")
    passages = _list(value_at_path(row, ("context", "sentences")), "context.sentences")
    needed = _list(value_at_path(row, ("supporting_facts", "title")), "supporting_facts.title")
    if len(titles) != len(passages):
        raise FormatError(f"context has {len(titles)} titles and {len(passages)} passages")
    supporting: list[str] = []
    for i, (title, passage) in enumerate(zip(titles, passages, strict=True)):
        if title in needed:
            name = f"context.sentences[{i}]"
            # Sentences begin with their own space.
            sentences = "".join(nonblank_text(sentence, name) for sentence in _list(passage, name)).strip()
            supporting.append(f"{nonblank_text(title, 'context.title')}\n{sentences}")
    if not supporting:
        raise FormatError("context has none of the passages that supporting_facts names")
    return Conversation.from_turns(("user", with_input(question, "\n\n".join(supporting))), ("assistant", answer))


def _text_at(row: Mapping[str, Any], *path: str) -> str:
    return nonblank_text(value_at_path(row, path), format_path(path))


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{name} is {describe_type(value)}: expected a list")
    return cast("list[Any]", value)


PUBLIC_DATASETS: dict[str, PublicDataset] = {
    "alpaca": PublicDataset(("tatsu-lab/alpaca",), ("instruction", "input", "output", "text"), alpaca),
    "dolly": PublicDataset(
        ("databricks/databricks-dolly-15k",),
        ("instruction", "context", "response", "category"),
        RequestAnswer(("instruction",), ("response",), context="context"),
    ),
    # For preferences the same rows are read by `preference`.
    "hh-rlhf": PublicDataset(("Anthropic/hh-rlhf",), ("chosen", "rejected"), hh_chosen),
    "gsm8k": PublicDataset(("gsm8k", "openai/gsm8k"), ("question", "answer"), gsm8k),
    "metamathqa": PublicDataset(
        ("meta-math/MetaMathQA",),
        ("type", "query", "original_question", "response"),
        RequestAnswer(("query",), ("response",)),
    ),
    "hotpot_qa": PublicDataset(
        ("hotpot_qa", "hotpotqa/hotpot_qa"),
        ("id", "question", "answer", "type", "level", "supporting_facts", "context"),
        hotpot,
    ),
    "mmlu": PublicDataset(("cais/mmlu",), ("question", "subject", "choices", "answer"), multiple_choice),
    "commonsense_qa": PublicDataset(
        ("commonsense_qa", "tau/commonsense_qa"),
        ("id", "question", "question_concept", "choices", "answerKey"),
        multiple_choice,
    ),
    "trivia_qa": PublicDataset(
        ("trivia_qa", "mandarjoshi/trivia_qa"),
        ("question", "question_id", "question_source", "entity_pages", "search_results", "answer"),
        RequestAnswer(("question",), ("answer", "value")),
    ),
    "truthfulqa": PublicDataset(
        ("domenicrosati/TruthfulQA",),
        ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"),
        RequestAnswer(("Question",), ("Best Answer",)),
    ),
    "finetome-100k": PublicDataset(("mlabonne/FineTome-100k",), ("conversations", "source", "score"), sharegpt),
    "wizardlm-evol-instruct-70k": PublicDataset(
        ("WizardLMTeam/WizardLM_evol_instruct_70k", "WizardLM/WizardLM_evol_instruct_70k"),
        ("instruction", "output"),
        RequestAnswer(("instruction",), ("output",)),
    ),
    "the-tome": PublicDataset(("arcee-ai/The-Tome",), ("conversations",), sharegpt),
    "ultrafeedback-binarized": PublicDataset(
        (
            "argilla/ultrafeedback-binarized-preferences-cleaned",
            "HuggingFaceH4/ultrafeedback_binarized",
        ),
        ("prompt", "chosen", "rejected"),
        preference,
    ),
    "ultrafeedback-preferences": PublicDataset(
        ("argilla/ultrafeedback-binarized-preferences",),
        (
            "source",
            "instruction",
            "chosen_response",
            "rejected_response",
            "chosen_avg_rating",
            "rejected_avg_rating",
            "chosen_model",
        ),
        preference,
    ),
    "hh-golden": PublicDataset(
        ("Unified-Language-Model-Alignment/Anthropic_HH_Golden",), ("chosen", "rejected"), preference
    ),
    "wikibooks-recipes": PublicDataset((), ("title", "ingredients", "steps"), wikibooks_recipes),
}


def find_by_hub_path(path: str) -> str | None:
    """The name of the entry for a source `hub:OWNER/NAME[@REVISION]`, if there is one."""
    if not path.startswith("hub:"):
        return None
    hub_id = path.removeprefix("hub:").split("@")[0].casefold()
    return next((name for name, entry in PUBLIC_DATASETS.items() if hub_id in map(str.casefold, entry.hub_ids)), None)
