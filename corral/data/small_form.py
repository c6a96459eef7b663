"""Makes the small form of a recipe: the starter model, made-up rows of each source's schema, a few steps.

Nothing else differs, but for the limits of a stage that aligns (its largest losses, and the tokens of a basic prompt's
answer). So a recipe for a GPU and data sets on the hub can be tried on any machine in minutes. A model learns nothing from the
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from corral.data.formats.public_datasets import find_by_hub_path
from corral.data.mixture import Side
from corral.errors import RecipeError
from corral.formatting import json_line
from corral.recipe import Recipe, Source, Split, Train
from corral.storage import write_atomic

STARTER_MODEL = "asset:smollm2-135m-instruct"
ROWS_PER_SOURCE = 12
"""Rows written for each source that is trained on or divided."""

_TOKENS = 8  # of an answer
_HELD_OUT = 2
_STEPS = 2
_LOSS_LIMIT = 9.0  # nats per token: a small model loses far more by quantisation than the recipe's own model

_Row: TypeAlias = dict[str, Any]

_THINGS = (
    "lamp",
    "kettle",
    "bicycle",
    "garden",
    "violin",
    "harbour",
    "notebook",
    "bridge",
    "orchard",
    "compass",
    "tent",
    "clock",
    "ladder",
    "basket",
    "drum",
    "kite",
)
_SAMPLES: dict[Side, range] = {
    "train": range(ROWS_PER_SOURCE),
    "validation": range(ROWS_PER_SOURCE, ROWS_PER_SOURCE + _HELD_OUT),
    "test": range(ROWS_PER_SOURCE + _HELD_OUT, ROWS_PER_SOURCE + 2 * _HELD_OUT),
}
"""Numbers of the sample rows of a source: a held-out one has others than those that are trained on."""


def shrink_recipe(recipe: Recipe, folder: Path) -> Recipe:
    """The small form of a recipe. Writes the rows of its sources into `folder`, a file for each.

    Sources that are assets, or local files of a format without sample rows, stay and are capped at as many rows.

    Raises:
        RecipeError: a source is remote, and the recipe does not tell its format.
        StorageError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, evaluate = recipe.data, recipe.evaluate
    sources = tuple(_small_source(source, folder / f"{i}.jsonl") for i, source in enumerate(data.sources, 1))
    test = evaluate.test and _small_source(evaluate.test, folder / "test.jsonl", "test")
    split = Split(
        validation=_HELD_OUT if data.held_out("validation") else 0, test=_HELD_OUT if data.held_out("test") else 0
    )
    tasks = tuple(task.model_copy(update={"rows": _HELD_OUT}) for task in evaluate.tasks)
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"base": STARTER_MODEL, "adapter": None}),
            "data": data.model_copy(update={"sources": sources, "split": split}),
            "train": tuple(_small_train(stage) for stage in recipe.train),
            "answer": recipe.answer.model_copy(update={"max_tokens": _TOKENS}),
            "evaluate": evaluate.model_copy(
                update={"loss_rows": _HELD_OUT, "answer_rows": _HELD_OUT, "tasks": tasks, "test": test}
            ),
        }
    )


def _small_source(source: Source, file: Path, side: Side | None = None) -> Source:
    side = side or source.side or "train"
    form = source.format
    if form == "auto" and source.mapping is None:
        form = find_by_hub_path(source.path) or form
    if source.mapping is None and form in SAMPLE_ROWS:
        write_atomic(file, "".join(json_line(SAMPLE_ROWS[form](i)) for i in _SAMPLES[side]))
        update: dict[str, Any] = {"path": str(file), "format": form, "name": source.label}
        return source.model_copy(update=update | {name: Source.model_fields[name].default for name in Source.READ_BY})
    if source.path.startswith(("hub:", "s3://")):
        raise RecipeError(
            f"the source {source.label!r} has no small form: the recipe does not tell what its rows look like",
            where="data.sources",
            hint=f"give its `format`, one of {', '.join(SAMPLE_ROWS)}, or try the recipe with a file of a few rows",
        )
    rows = len(_SAMPLES[side])
    return source.model_copy(update={"rows": min(source.rows or rows, rows)})


def _small_train(stage: Train) -> Train:
    return stage.model_copy(
        update={
            "epochs": None,
            "steps": _STEPS,
            "batch_size": min(stage.batch_size, 4),
            "evaluate_every": 1,
            "evaluate_rows": _HELD_OUT,
            "checkpoint_every": 1,
            "guards": stage.guards
            and stage.guards.model_copy(
                update={"loss_rise": _LOSS_LIMIT, "quantisation_gap": _LOSS_LIMIT, "max_tokens": 2 * _TOKENS}
            ),
        }
    )


def _alpaca(i: int) -> _Row:
    thing = _THINGS[i]
    given = f"The {thing} was bought in the spring." if i % 2 else ""
    instruction = "Put the sentence into the present." if i % 2 else f"Name a use of a {thing}."
    output = f"The {thing} is bought in the spring." if i % 2 else f"A {thing} can be lent to a friend."
    parts = f"{instruction}\n\n### Input:\n{given}" if given else instruction
    return {
        "instruction": instruction,
        "input": given,
        "output": output,
        "text": f"### Instruction:\n{parts}\n\n### Response:\n{output}",
    }


def _dolly(i: int) -> _Row:
    context = f"The {_THINGS[i]} of the town is {i + 20} years old." if i % 2 else ""
    return {
        "instruction": f"How old is the {_THINGS[i]}?" if context else f"Write one line about a {_THINGS[i]}.",
        "context": context,
        "response": f"It is {i + 20} years old." if context else f"There stood a {_THINGS[i]} in the rain.",
        "category": "closed_qa" if context else "creative_writing",
    }


def _pair(i: int, better: str, worse: str) -> _Row:
    prompt = f"\n\nHuman: Hello\n\nAssistant: Hi, what is it?\n\nHuman: May I take the {_THINGS[i]}?\n\nAssistant: "
    return {"chosen": prompt + better, "rejected": prompt + worse}


def _metamathqa(i: int) -> _Row:
    query = f"What is {i + 5} more than {2 * i}?"
    answer = f"{2 * i} + {i + 5} = {3 * i + 5}.\nThe answer is: {3 * i + 5}"
    return {"type": "GSM_Rephrased", "query": query, "original_question": query, "response": answer}


def _hotpot_qa(i: int) -> _Row:
    first, second = f"{_THINGS[i].title()} House", f"Architect {i}"
    return {
        "id": f"small{i}",
        "question": f"In which year was the architect of {first} born?",
        "answer": str(1850 + i),
        "type": "bridge",
        "level": "easy",
        "supporting_facts": {"title": [first, second], "sent_id": [0, 0]},
        "context": {
            "title": [first, second, "Rain"],
            "sentences": [[f"{first} was drawn by {second}."], [f"{second} was born in {1850 + i}."], ["Rain is wet."]],
        },
    }


def _mmlu(i: int) -> _Row:
    choices = [str(7 * i + step) for step in range(4)]
    return {"question": f"Which is {7 * i} + {i % 4}?", "subject": "arithmetic", "choices": choices, "answer": i % 4}


def _commonsense_qa(i: int) -> _Row:
    texts = ["in the sea", f"where a {_THINGS[i]} is kept", "on the moon", "in a cloud", "in a tooth"]
    return {
        "id": f"small{i}",
        "question": f"Where do you look for a {_THINGS[i]}?",
        "question_concept": _THINGS[i],
        "choices": {"label": list("ABCDE"), "text": texts},
        "answerKey": "B",
    }


def _trivia_qa(i: int) -> _Row:
    value = f"The {_THINGS[i].title()}"
    pages = ("doc_source", "filename", "title", "wiki_context")
    results = ("description", "filename", "rank", "title", "url", "search_context")
    return {
        "question": f"Which prize is given to riddle number {i}?",
        "question_id": f"small_{i}",
        "question_source": "made up",
        "entity_pages": {name: list[str]() for name in pages},
        "search_results": {name: list[str]() for name in results},
        "answer": {
            "aliases": [value, _THINGS[i]],
            "normalized_aliases": [_THINGS[i]],
            "matched_wiki_entity_name": "",
            "normalized_matched_wiki_entity_name": "",
            "normalized_value": _THINGS[i],
            "type": "WikipediaEntity",
            "value": value,
        },
    }


def _turns(i: int, about: str) -> list[dict[str, str]]:
    turns = [
        {"from": "human", "value": f"Tell me something about a {about}."},
        {"from": "gpt", "value": f"A {about} is older than it looks."},
    ]
    more = [{"from": "human", "value": "How old?"}, {"from": "gpt", "value": f"{i + 3} years."}]
    return [*turns, *more] if i % 3 else turns


def _the_tome(i: int) -> _Row:
    system = [{"from": "system", "value": "Answer in one sentence."}] if i % 2 else []
    return {"conversations": [*system, *_turns(i, f"small {_THINGS[i]}")]}


def _wizardlm(i: int) -> _Row:
    steps = f"1. Look at the {_THINGS[i]}.\n2. Note what you see."
    return {"instruction": f"List two steps to describe a {_THINGS[i]}.", "output": steps}


def _ultrafeedback(i: int) -> _Row:
    prompt = f"Give me a name for a {_THINGS[i]}."
    question = {"role": "user", "content": prompt}
    names = (f"Old {_THINGS[i].title()}", "No.")
    chosen, rejected = ([question, {"role": "assistant", "content": name}] for name in names)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _ultrafeedback_texts(i: int) -> _Row:
    return {
        "source": "made up",
        "instruction": f"Give me a use for an old {_THINGS[i]}.",
        "chosen_response": f"Put the {_THINGS[i]} into the garden and grow beans in it.",
        "rejected_response": f"There is none for a {_THINGS[i]}.",
        "chosen_avg_rating": 4.5,
        "rejected_avg_rating": 2.0 + i % 3,
        "chosen_model": "made up",
    }


def _question_answer(i: int) -> _Row:
    row = {"question": f"How many days of leave come with grade {i}?", "answer": f"{20 + i} days."}
    return row | {"context": f"Grade {i}: {20 + i} days of leave."} if i % 2 else row


def _messages(i: int) -> _Row:
    question = {"role": "user", "content": f"Spell {_THINGS[i]}."}
    return {"messages": [question, {"role": "assistant", "content": "-".join(_THINGS[i])}]}


SAMPLE_ROWS: dict[str, Callable[[int], _Row]] = {
    "alpaca": _alpaca,
    "dolly": _dolly,
    "hh-rlhf": lambda i: _pair(i, f"Ask the owner of the {_THINGS[i]} first.", "Yes, why not."),
    "gsm8k": lambda i: {
        "question": f"Ann has {i + 2} boxes of 3 pens each. How many pens has she?",
        "answer": f"There are {i + 2}*3=<<{i + 2}*3={3 * i + 6}>>{3 * i + 6} pens.\n#### {3 * i + 6}",
    },
    "metamathqa": _metamathqa,
    "hotpot_qa": _hotpot_qa,
    "mmlu": _mmlu,
    "commonsense_qa": _commonsense_qa,
    "trivia_qa": _trivia_qa,
    "truthfulqa": lambda i: {
        "Type": "Adversarial",
        "Category": "Misconceptions",
        "Question": f"What happens if you walk under a {_THINGS[i]}?",
        "Best Answer": f"Nothing happens if you walk under a {_THINGS[i]}",
        "Correct Answers": "Nothing happens; You get to the other side",
        "Incorrect Answers": "You have bad luck; You never sleep again",
        "Source": "https://example.org",
    },
    "finetome-100k": lambda i: {"conversations": _turns(i, _THINGS[i]), "source": "made up", "score": 4.5},
    "wizardlm-evol-instruct-70k": _wizardlm,
    "the-tome": _the_tome,
    "ultrafeedback-binarized": _ultrafeedback,
    "ultrafeedback-preferences": _ultrafeedback_texts,
    "hh-golden": lambda i: _pair(
        i, f"If the {_THINGS[i]} is not yours, please ask whose it is.", f"Take the {_THINGS[i]} and run."
    ),
    "question-answer": _question_answer,
    "messages": _messages,
}
"""For each format a function from a number of `_SAMPLES` to a row with the columns of the real data set."""
