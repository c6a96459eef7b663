"""The contract passes what is the same model, and catches each way in which it is not."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from corral import contract
from corral.engines.transformers import TransformersEngine
from corral.errors import ContractError
from corral.model.loading import load_model, load_tokenizer
from corral.template import Template

FLOAT32 = contract.TOLERANCES["float32"]


def measured(model: Any, template: Template) -> list[list[float]]:
    async def work() -> list[list[float]]:
        async with TransformersEngine(model) as engine:
            return await contract.measure(engine, contract.probes(template))

    return asyncio.run(work())


@pytest.fixture
def template(tiny_folder: Path) -> Template:
    return Template.load(load_tokenizer(tiny_folder))


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def test_a_model_equals_itself_loaded_again(tiny_folder: Path, template: Template) -> None:
    a, b = (measured(load_model(tiny_folder), template) for _ in range(2))
    check = contract.compare_logprobs("again", a, b, FLOAT32)
    assert check.passed
    assert check.n == sum(len(x) for x in a) > 50


@pytest.mark.parametrize(
    "fault",
    [
        lambda m: m.model.layers[1].self_attn.q_proj.weight.mul_(1.05),
        lambda m: m.model.layers[0].self_attn.k_proj.weight.copy_(m.model.layers[0].self_attn.k_proj.weight.flip(0)),
        lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
        lambda m: m.model.norm.weight.fill_(float("nan")),
    ],
    ids=["a weight off by 5 %", "rows permuted", "wrong rope", "not a number"],
)
def test_a_planted_fault_in_the_model_is_caught(fault: Any, tiny_folder: Path, template: Template) -> None:
    good = measured(load_model(tiny_folder), template)
    broken = load_model(tiny_folder)
    with torch.no_grad():
        fault(broken)
    check = contract.compare_logprobs("planted", good, measured(broken, template), FLOAT32)
    assert not check.passed
    with pytest.raises(ContractError, match="planted"):
        contract.enforce([check], where=tiny_folder)


def test_equal_token_ids_and_stop_ids_pass(folder: Path, template: Template) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(template.stop_ids)}))
    assert contract.check_token_ids(template, folder).passed
    assert contract.check_stop_ids(template, folder).passed


def test_another_template_is_caught(folder: Path, template: Template) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("'\\n'", "' '"))
    assert not contract.check_token_ids(template, folder).passed


def test_another_tokenizer_is_caught(folder: Path, template: Template) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"] = value["model"]["merges"][:20]
    path.write_text(json.dumps(value))
    assert not contract.check_token_ids(template, folder).passed


def test_a_template_that_knows_no_system_message_can_be_held_to_a_contract(tiny_tokenizer: Any) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert len(contract.probes(Template(tiny_tokenizer, source, "no system"))) == len(contract.PROBES) - 1


def test_a_contract_that_measured_nan_is_written_and_fails(folder: Path, template: Template) -> None:
    probe_set = contract.probes(template)
    values = [[float("nan")] * (len(p.ids) - p.start) for p in probe_set]
    check = contract.compare_logprobs("nan", values, values, FLOAT32)
    contract.write(folder, template, probe_set, values, [check], dtype="float32")
    assert not json.loads((folder / contract.FILE).read_text())["passed"]


@pytest.mark.parametrize("saved", [{}, {"eos_token_id": 0}, {"eos_token_id": [0, 1]}])
def test_a_missing_end_token_is_caught(saved: dict[str, Any], folder: Path, template: Template) -> None:
    (folder / "generation_config.json").write_text(json.dumps(saved))
    assert not contract.check_stop_ids(template, folder).passed


def test_a_written_contract_is_enough_to_check_the_folder_again(folder: Path, template: Template) -> None:
    model = load_model(folder)
    probe_set = contract.probes(template)
    values = measured(model, template)
    check = contract.compare_logprobs("again", values, values, FLOAT32)
    contract.write(folder, template, probe_set, values, [check], dtype="float32")
    record = json.loads((folder / contract.FILE).read_text())
    assert record["passed"]
    assert record["version"] == contract.VERSION
    kept = [contract.Probe(tuple(p["ids"]), p["start"]) for p in record["probes"]]
    assert kept == probe_set
    again = measured(load_model(folder), template)
    assert contract.compare_logprobs("kept", [p["logprobs"] for p in record["probes"]], again, FLOAT32).passed
