"""One good row of each format, made up, of the true schema; which of its texts to spoil; and what it must become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from corral.data.formats import FormatError
from corral.messages import Conversation, Feedback, Preference, Record, Text

TURNS = [{"role": "user", "content": "Which is larger?"}, {"role": "assistant", "content": "The sun."}]
SAID = [{"from": "human", "value": "Which is larger?"}, {"from": "gpt", "value": "The sun."}]
ASKED = Conversation.from_turns(("user", "Which is larger?"), ("assistant", "The sun."))
PROMPT = Conversation.from_turns(("user", "Which is larger?"))
HH = "\n\nHuman: Which is larger?\n\nAssistant: The sun."
HH_WORSE = "\n\nHuman: Which is larger?\n\nAssistant: The moon."
OPTIONS = "Which is larger?\n\nA. The moon\nB. The sun"

SHAPES: dict[str, tuple[dict[str, Any], tuple[str | int, ...], Record]] = {
    "messages": ({"messages": TURNS}, ("messages", 1, "content"), ASKED),
    "sharegpt": ({"conversations": SAID}, ("conversations", 1, "value"), ASKED),
    # Schema of tatsu-lab/alpaca: dataset_info of copies of it (danielkorat/alpaca).
    "alpaca": (
        {"instruction": "Add them.", "input": "1 and 2", "output": "3", "text": "Below is an instruction … 3"},
        ("output",),
        Conversation.from_turns(("user", "Add them.\n\n### Input:\n1 and 2"), ("assistant", "3")),
    ),
    "prompt-completion": ({"prompt": "Which is larger?", "completion": "The sun."}, ("prompt",), ASKED),
    "question-answer": (
        {"question": "Who came?", "answer": "Ada", "context": "Ada came."},
        ("answer",),
        Conversation.from_turns(("user", "Who came?\n\n### Input:\nAda came."), ("assistant", "Ada")),
    ),
    "text": ({"text": "Once upon a time."}, ("text",), Text("Once upon a time.")),
    "preference": (
        {"prompt": "Which is larger?", "chosen": "The sun.", "rejected": "The moon."},
        ("chosen",),
        Preference(PROMPT, "The sun.", "The moon."),
    ),
    "feedback": (
        {"prompt": "Which is larger?", "completion": "The sun.", "label": True},
        ("completion",),
        Feedback(PROMPT, "The sun.", 1.0),
    ),
    "multiple-choice": (
        {"question": "Which is larger?", "choices": ["The moon", "The sun"], "answer": 1},
        ("question",),
        Conversation.from_turns(("user", OPTIONS), ("assistant", "B. The sun")),
    ),
}
NAMED: dict[str, tuple[dict[str, Any], tuple[str | int, ...], Record]] = {
    "chosen-answer": (
        {"prompt": "Which is larger?", "chosen": "The sun.", "rejected": "The moon."},
        ("chosen",),
        ASKED,
    ),
    # Schema: the TensorFlow Datasets catalogue, "databricks_dolly".
    "dolly": (
        {"instruction": "Who came?", "context": "Ada came.", "response": "Ada", "category": "closed_qa"},
        ("response",),
        Conversation.from_turns(("user", "Who came?\n\n### Input:\nAda came."), ("assistant", "Ada")),
    ),
    # Schema: the data set's card: each line a pair of texts, `chosen` and `rejected`.
    "hh-rlhf": ({"chosen": HH, "rejected": HH_WORSE}, ("chosen",), ASKED),
    # Schema: the column list in nickmalhotra/ProjectIndus, SFT/dataset.ini, for "openai/gsm8k", config main.
    "gsm8k": (
        {"question": "6 boxes of 7?", "answer": "6 boxes of 7 are 6*7=<<6*7=42>>42.\n#### 42"},
        ("answer",),
        Conversation.from_turns(("user", "6 boxes of 7?"), ("assistant", "6 boxes of 7 are 6*7=42.\n#### 42")),
    ),
    # Schema: the card's dataset_info of a published copy (CCCarloooo/mmqa_146k, "MetaMathQA").
    "metamathqa": (
        {"type": "GSM_SV", "query": "6 x 7?", "original_question": "6 times?", "response": "The answer is: 42"},
        ("response",),
        Conversation.from_turns(("user", "6 x 7?"), ("assistant", "The answer is: 42")),
    ),
    # Schema: the card's dataset_info and its example row (hotpotqa/hotpot_qa).
    "hotpot_qa": (
        {
            "id": "000001",
            "question": "Where was the sister of Ada born?",
            "answer": "Rome",
            "type": "bridge",
            "level": "hard",
            "supporting_facts": {"title": ["Ada", "Eve"], "sent_id": [0, 1]},
            "context": {
                "title": ["Ada", "Bob", "Eve"],
                "sentences": [
                    ["Ada has a sister,", " Eve."],
                    ["Bob is tall."],
                    ["Eve is a smith.", " She is of Rome."],
                ],
            },
        },
        ("answer",),
        Conversation.from_turns(
            (
                "user",
                "Where was the sister of Ada born?\n\n### Input:\nAda\nAda has a sister, Eve.\n\nEve\nEve is a smith. "
                "She is of Rome.",
            ),
            ("assistant", "Rome"),
        ),
    ),
    # Schema: dataset_info of hails/mmlu_no_train, a copy without one split; `answer` is a class label, read as its number.
    "mmlu": (
        {"question": "Which is larger?", "subject": "astronomy", "choices": ["The moon", "The sun"], "answer": 1},
        ("question",),
        Conversation.from_turns(("user", OPTIONS), ("assistant", "B. The sun")),
    ),
    # Schema: the features listed in the TensorFlow Datasets catalogue, "huggingface:commonsense_qa".
    "commonsense_qa": (
        {
            "id": "1afa02df",
            "question": "Which is larger?",
            "question_concept": "large",
            "choices": {"label": ["A", "B"], "text": ["The moon", "The sun"]},
            "answerKey": "B",
        },
        ("question",),
        Conversation.from_turns(("user", OPTIONS), ("assistant", "B. The sun")),
    ),
    # Schema: dataset_info of lighteval/trivia_qa and mandarjoshi/trivia_qa, config rc.nocontext.
    "trivia_qa": (
        {
            "question": "Which is larger?",
            "question_id": "tc_1",
            "question_source": "http://example.org",
            "entity_pages": {"doc_source": [], "filename": [], "title": [], "wiki_context": []},
            "search_results": {"description": [], "filename": [], "rank": [], "title": [], "url": []},
            "answer": {
                "aliases": ["Sun"],
                "normalized_value": "the sun",
                "type": "WikipediaEntity",
                "value": "The sun.",
            },
        },
        ("answer", "value"),
        ASKED,
    ),
    # Schema: dataset_info of jacobmorrison/TruthfulQA, a copy of the same table.
    "truthfulqa": (
        {
            "Type": "Adversarial",
            "Category": "Space",
            "Question": "Which is larger?",
            "Best Answer": "The sun.",
            "Correct Answers": "The sun; It is the sun",
            "Incorrect Answers": "The moon",
            "Source": "http://example.org",
        },
        ("Best Answer",),
        ASKED,
    ),
    # Schema: the card's dataset_info (mlabonne/FineTome-100k).
    "finetome-100k": (
        {"conversations": SAID, "source": "infini-instruct-top-500k", "score": 5.2},
        ("conversations", 1, "value"),
        ASKED,
    ),
    # Schema: public code that reads it (instruction, output).
    "wizardlm-evol-instruct-70k": (
        {"instruction": "Which is larger?", "output": "The sun."},
        ("output",),
        ASKED,
    ),
    # Schema: its card names the ShareGPT data sets it is made of, but no columns; that they are `conversations` is taken
    # from FineTome, which is a part of it.
    "the-tome": ({"conversations": SAID}, ("conversations", 1, "value"), ASKED),
    # Schema: dataset_info of HuggingFaceH4/ultrafeedback_binarized and copies of argilla's cleaned form.
    "ultrafeedback-binarized": (
        {
            "source": "evol_instruct",
            "prompt": "Which is larger?",
            "chosen": TURNS,
            "chosen-rating": 5.0,
            "rejected": [TURNS[0], {"role": "assistant", "content": "The moon."}],
            "rejected-rating": 3.0,
        },
        ("chosen", 1, "content"),
        Preference(PROMPT, "The sun.", "The moon."),
    ),
    # Schema: public code that reads it; the card was not found.
    "ultrafeedback-preferences": (
        {
            "source": "evol_instruct",
            "instruction": "Which is larger?",
            "chosen_response": "The sun.",
            "rejected_response": "The moon.",
            "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 3.0,
            "chosen_model": "a",
        },
        ("chosen_response",),
        Preference(PROMPT, "The sun.", "The moon."),
    ),
    # Schema: the data set's card, which calls it an extension of HH; the columns are those of HH.
    "hh-golden": (
        {"chosen": HH, "rejected": HH_WORSE},
        ("chosen",),
        Preference(PROMPT, "The sun.", "The moon."),
    ),
    # Schema: the packaged asset, which tests read whole.
    "wikibooks-recipes": (
        {"title": "Toast", "ingredients": ["bread", "butter", "salt"], "steps": ["Toast the bread.", "Butter it."]},
        ("title",),
        Conversation.from_turns(
            ("user", "Write a recipe with these ingredients:\n- bread\n- butter\n- salt"),
            ("assistant", "# Toast\n\n1. Toast the bread.\n2. Butter it."),
        ),
    ),
}
GOOD = SHAPES | NAMED


def reason(function: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any]) -> str:
    """The reason a format gives for refusing a row."""
    with pytest.raises(FormatError) as caught:
        function(row)
    return caught.value.reason
