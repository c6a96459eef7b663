"""Public data sets by name: where each lies, the columns it has, and what becomes prompt and answer.

An entry is a few words where the data set is some texts in columns, and the name of a format where it has that form. This
module does not fetch anything, and does not know which rows a recipe takes.
"""

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
    """A request and its answer, each a column or a path to a text in one; and perhaps material that the request is about."""

    request: tuple[str, ...]
    answer: tuple[str, ...]
    context: str | None = None

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """Raises: FormatError."""
        request = nonblank_text(value_at_path(row, self.request), format_path(self.request))
        if self.context is not None:
            request = with_input(request, optional_column_text(row, self.context))
        return Conversation.from_turns(
            ("user", request), ("assistant", nonblank_text(value_at_path(row, self.answer), format_path(self.answer)))
        )


@dataclass(frozen=True, slots=True)
class PublicDataset:
    """A public data set.

    Args:
        hub: its names on the hub.
        columns: all columns it has there.
        read: a row → a record.
    """

    hub_ids: tuple[str, ...]
    columns: tuple[str, ...]
    read: Format

    def __call__(self, row: Mapping[str, Any]) -> Record:
        """Raises: FormatError."""
        return self.read(row)


def gsm8k(row: Mapping[str, Any]) -> Conversation:
    """A school maths problem, worked out and closed by `#### 42`; marks for a calculator (`<<6*7=42>>`) are taken out.

    Raises:
        FormatError: a text is missing.
    """
    question, answer = (
        nonblank_text(value_at_path(row, ("question",)), "question"),
        nonblank_text(value_at_path(row, ("answer",)), "answer"),
    )
    return Conversation.from_turns(
        ("user", question), ("assistant", nonblank_text(_CALCULATOR.sub("", answer), "answer"))
    )


def hotpot(row: Mapping[str, Any]) -> Conversation:
    """A question about the passages that it takes to answer it; the other eight or so are left out, as they would not fit.

    Raises:
        FormatError: `context` has none of the passages that `supporting_facts` names, or a text is missing.
    """
    question, answer = (
        nonblank_text(value_at_path(row, ("question",)), "question"),
        nonblank_text(value_at_path(row, ("answer",)), "answer"),
    )
    titles = _list(value_at_path(row, ("context", "title")), "context.title")
    passages = _list(value_at_path(row, ("context", "sentences")), "context.sentences")
    needed = _list(value_at_path(row, ("supporting_facts", "title")), "supporting_facts.title")
    if len(titles) != len(passages):
        raise FormatError(f"context has {len(titles)} titles and {len(passages)} passages")
    found: list[str] = []
    for i, (title, passage) in enumerate(zip(titles, passages, strict=True)):
        if title in needed:
            name = f"context.sentences[{i}]"
            # A sentence brings the space before it.
            sentences = "".join(nonblank_text(sentence, name) for sentence in _list(passage, name)).strip()
            found.append(f"{nonblank_text(title, 'context.title')}\n{sentences}")
    if not found:
        raise FormatError("context has none of the passages that supporting_facts names")
    return Conversation.from_turns(("user", with_input(question, "\n\n".join(found))), ("assistant", answer))


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
            "argilla/ultrafeedback-binarized-preferences",
            "argilla/ultrafeedback-binarized-preferences-cleaned",
            "HuggingFaceH4/ultrafeedback_binarized",
        ),
        ("prompt", "chosen", "rejected"),
        preference,
    ),
    "hh-golden": PublicDataset(
        ("Unified-Language-Model-Alignment/Anthropic_HH_Golden",), ("chosen", "rejected"), preference
    ),
    "wikibooks-recipes": PublicDataset((), ("title", "ingredients", "steps"), wikibooks_recipes),
}


def find_by_hub_path(path: str) -> str | None:
    """The entry for a source `hub:OWNER/NAME[@REVISION]`, if there is one."""
    if not path.startswith("hub:"):
        return None
    wanted = path.removeprefix("hub:").split("@")[0].casefold()
    return next((name for name, entry in PUBLIC_DATASETS.items() if wanted in map(str.casefold, entry.hub_ids)), None)
