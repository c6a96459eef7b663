from __future__ import annotations

from typing import Any

import pytest

from corral.data.formats.prompt_response import alpaca, plain_text, prompt_completion, question_answer
from corral.messages import INPUT_HEADING, Conversation, Text
from tests.data.formats.rows import reason


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"input": " \n"}, {"input": float("nan")}])
def test_an_instruction_without_input_is_asked_alone(empty: dict[str, Any]) -> None:
    row = {"instruction": "Sing.", "output": "La"} | empty
    assert alpaca(row) == Conversation.from_turns(("user", "Sing."), ("assistant", "La"))


def test_an_input_follows_the_instruction_after_its_heading() -> None:
    record = alpaca({"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be exact."})
    assert record == Conversation.from_turns(
        ("system", "Be exact."), ("user", f"Add.{INPUT_HEADING}1, 2"), ("assistant", "3")
    )


def test_texts_are_taken_as_they_are() -> None:
    record = prompt_completion({"prompt": " The sky\n", "completion": " is blue. "})
    assert [m.content for m in record.messages] == [" The sky\n", " is blue. "]


@pytest.mark.parametrize("names", [("prompt", "completion"), ("query", "response"), ("input", "output")])
def test_prompt_and_completion_may_have_any_of_their_names(names: tuple[str, str]) -> None:
    row = {names[0]: "Hello?", names[1]: "Hello."}
    assert prompt_completion(row) == Conversation.from_turns(("user", "Hello?"), ("assistant", "Hello."))


def test_prompt_and_completion_may_be_messages() -> None:
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello?"}]
    answer = {"role": "assistant", "content": "Hello."}
    expected = Conversation.from_turns(("system", "S"), ("user", "Hello?"), ("assistant", "Hello."))
    assert prompt_completion({"prompt": prompt, "completion": [answer]}) == expected
    assert prompt_completion({"prompt": prompt, "completion": answer}) == expected
    assert prompt_completion({"prompt": prompt, "completion": "Hello.", "system": "S"}) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": r, "content": c} for r, c in (("user", "Hi?"), ("assistant", "Hi."), ("user", "More?"))],
        "\n\nHuman: Hi?\n\nAssistant: Hi.\n\nHuman: More?\n\nAssistant:",
        "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ],
)
def test_earlier_answers_in_a_prompt_are_context_and_the_completion_is_trained(prompt: Any) -> None:
    record = prompt_completion({"prompt": prompt, "completion": "Yes."})
    assert [(m.content, m.trained) for m in record.messages] == [
        ("Hi?", True),
        ("Hi.", False),
        ("More?", True),
        ("Yes.", True),
    ]
    for column in ("context", "history"):
        assert column in reason(prompt_completion, {"prompt": prompt, "completion": "Yes.", column: [["q", "a"]]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [], "completion": "x"}, "prompt is an empty list"),
        ({"prompt": "x", "completion": []}, "completion is an empty list"),
        ({"prompt": "x", "completion": [{"role": "user", "content": "y"}]}, "completion is from the user"),
        ({"prompt": 1.5, "completion": "x"}, "prompt is a number: expected text"),
        ({"prompt": "x"}, "no `completion`: the row has 'prompt'"),
    ],
)
def test_a_prompt_or_completion_of_another_form_is_refused(row: dict[str, Any], expected: str) -> None:
    assert reason(prompt_completion, row).startswith(expected)


def test_a_context_follows_the_question_as_its_input() -> None:
    row = {"question": "Who?", "answer": "Ada", "context": "Ada came."}
    assert question_answer(row).messages[0].content == f"Who?{INPUT_HEADING}Ada came."
    assert question_answer(row | {"context": None}).messages[0].content == "Who?"
    assert reason(question_answer, row | {"context": ["Ada came."]}) == "context is a list: expected text"


def test_a_document_becomes_a_text_record() -> None:
    assert plain_text({"text": "Once\n", "meta": 1}) == Text("Once\n")
    assert plain_text({"content": "Once"}) == Text("Once")


def test_a_prompt_that_only_begins_like_a_dialogue_is_a_text() -> None:
    record = prompt_completion({"prompt": "Human: what is one?", "completion": "You."})
    assert record.messages[0].content == "Human: what is one?"


def test_a_dialogue_of_hh_is_a_prompt_with_or_without_its_first_line_breaks() -> None:
    expected = Conversation.from_turns(("user", "Hi?"), ("assistant", "Yes."))
    for start in ("\n\n", ""):
        assert prompt_completion({"prompt": f"{start}Human: Hi?\n\nAssistant:", "completion": "Yes."}) == expected
    assert prompt_completion({"prompt": "Human: who?", "completion": "A."}).messages[0].content == "Human: who?"


def test_what_stands_beside_a_rendered_text_is_not_left_out_unseen() -> None:
    row = {"text": "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"}
    assert plain_text(row) == Conversation.from_turns(("user", "Hi?"), ("assistant", "Yes."))
    assert "`history`" in reason(plain_text, row | {"history": [["q", "a"]]})
    assert "`label` judges" in reason(plain_text, row | {"label": False})
    assert plain_text({"text": "A film.", "label": False}) == Text("A film.")


@pytest.mark.parametrize("end", ["</s>", "<|endoftext|>\n", "<|end|>"])
def test_a_document_does_not_end_in_the_letters_of_an_end_token(end: str) -> None:
    assert reason(plain_text, {"text": f"Once{end}"}).startswith("text ends in <")
    assert plain_text({"text": f"{end} is an end token."}) == Text(f"{end} is an end token.")
