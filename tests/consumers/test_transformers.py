"""What corral writes is one model to transformers 4 and 5 and their PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from corral.model import adapters
from corral.model.loading import load_model
from corral.recipe import Lora
from tests.consumers.cases import CHATS, Case, greedy, logprobs
from tests.model.tiny import fill_lora_b

TRANSFORMERS_4 = Path(__file__).parents[2] / ".transformers4"
"""Packages that `make test-full` puts there; they shadow those of this environment."""


def open_in(version: str, cases: dict[str, Case], adapter: Path | None = None) -> dict[str, Any]:
    """What that version of transformers makes of the cases, in a Python of its own."""
    asked = {
        name: {
            "folder": str(case.folder),
            "adapter": None if adapter is None else str(adapter),
            "chats": [chat.to_json()["messages"] for chat in CHATS],
            "ids": case.ids,
        }
        for name, case in cases.items()
    }
    packages = {} if version == "5" else {"PYTHONPATH": str(TRANSFORMERS_4)}
    script = Path(__file__).with_name("open_with_transformers.py")
    done = subprocess.run(
        [sys.executable, script],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | packages,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert {result["version"].partition(".")[0] for result in results.values()} == {version}
    return results


@pytest.fixture(params=["5", "4"])
def version(request: pytest.FixtureRequest) -> str:
    if request.param == "4" and not TRANSFORMERS_4.is_dir():
        pytest.skip(f"transformers 4 is not in {TRANSFORMERS_4.name}; `make test-full` puts it there")
    return request.param


def test_a_merged_folder_is_the_same_model(version: str, cases: dict[str, Case]) -> None:
    results = open_in(version, cases)
    assert len(results) == 12
    for name, case in cases.items():
        assert results[name]["prompts"] == case.prompts, name
        assert results[name]["logprobs"] == pytest.approx(case.logprobs, abs=1e-4), name
        assert results[name]["answers"] == case.answers, name


def test_an_adapter_on_its_base_is_the_same_model(version: str, cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["llama3, tied"]
    model: Any = adapters.attach(load_model(case.folder), Lora(targets="all-linear"), seed=3)
    adapters.save(fill_lora_b(model, 0.05), tmp_path, base=str(case.folder))
    (result,) = open_in(version, {"adapted": case}, tmp_path).values()
    assert result["prompts"] == case.prompts
    assert result["logprobs"] == pytest.approx(logprobs(model.eval(), case.ids), abs=1e-4)
    assert result["logprobs"] != pytest.approx(case.logprobs, abs=1e-2)
    stops = list(case.template.stop_ids)
    assert result["answers"] == [greedy(model, prompt, stops) for prompt in case.prompts]
