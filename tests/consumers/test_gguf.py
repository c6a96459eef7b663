"""A GGUF export is one model to llama.cpp, and its Modelfile says to Ollama where answers end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.export.export import export_form
from corral.export_forms import ExportForm
from corral.progress import Progress
from tests.consumers.cases import CHATS, LONGEST, Case
from tests.export.modelfile import read_modelfile

FORM = ExportForm("gguf", "f16")
ROUNDING = 0.05
"""Of the weights to float16; a wrong rotary embedding changes log-probabilities by more than one."""


@pytest.mark.parametrize("heads", ["tied", "untied"])
@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_a_gguf_file_is_the_same_model(
    rope: str, heads: str, cases: dict[str, Case], tmp_path: Path, llama: Callable[..., Any]
) -> None:
    case = cases[f"{rope}, {heads}"]
    path = export_form(case.folder, tmp_path, FORM, Progress())
    run = llama(path)
    for chat, prompt in zip(CHATS, case.prompts, strict=True):
        assert run.chat_ids(chat) == prompt
    # Only the short answer: in a longer one, rounding to float16 may choose between two ids that are nearly as likely.
    settings = {"n_predict": 24, "temperature": 0, "repeat_penalty": 1.0, "return_tokens": True}
    completion = run.post("/completion", prompt=case.prompts[0], **settings)
    assert completion["tokens"] == case.answers[0]
    assert completion["stop_type"] == "eos"
    for length in (5, 100, LONGEST - 2):
        next_id = case.ids[length]
        logprob = run.logprobs(case.ids[:length], case.template.tokenizer.vocab_size)[next_id]
        assert logprob == pytest.approx(case.logprobs[length - 1], abs=ROUNDING), length
    commands = read_modelfile((tmp_path / "Modelfile-f16").read_text("utf-8"))
    assert ("from", f"./{path.name}") in commands
    ends = {"<|im_end|>", case.template.decode([case.answers[0][-1]])}
    assert {value for name, value in commands if name == "stop"} == ends
