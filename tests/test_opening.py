"""What a user names becomes an Answerer with a name and a fingerprint."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from corral.engines.base import Sampling
from corral.errors import ModelError
from corral.messages import Conversation
from corral.opening import Opened, open_model

ASKED = Conversation.of(("user", "Hello"))


def opened(folder: Path) -> Opened:
    made = open_model(str(folder), "transformers", Sampling(max_tokens=4))
    asyncio.run(made.answerer.engine.close())
    return made


def test_a_folder_is_served_under_its_name_and_answers(tiny_folder: Path) -> None:
    async def work() -> None:
        made = open_model(f"{tiny_folder}/", "transformers", Sampling(max_tokens=4))
        async with made.answerer.engine:
            assert made.name == tiny_folder.name
            assert len((await made.answerer.answer(ASKED)).completions[0].ids) <= 4

    asyncio.run(work())


def test_the_fingerprint_follows_weights_and_template_and_nothing_else(tiny_folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    assert opened(copy).fingerprint == opened(tiny_folder).fingerprint
    template = copy / "chat_template.jinja"
    template.write_text("{# another #}" + template.read_text())
    assert opened(copy).fingerprint != opened(tiny_folder).fingerprint
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert opened(other).fingerprint != opened(tiny_folder).fingerprint


def test_a_model_that_is_not_there_is_said() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        open_model("nowhere")
