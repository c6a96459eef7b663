"""The contract passes what is the same model, and catches each way in which it is not."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.engines.transformers import TransformersEngine
from corral.errors import ContractError, ModelError
from corral.export import contract
from corral.model.loading import load_model
from corral.template import Template
from tests.conftest import change_json

FLOAT32 = contract.TOLERANCES["float32"]


def with_engine(model: Any, use: Callable[[TransformersEngine], Coroutine[Any, Any, Any]]) -> Any:
    async def work() -> Any:
        async with TransformersEngine(model) as engine:
            return await use(engine)

    return asyncio.run(work())


def measured(model: Any, template: Template) -> list[list[float]]:
    return with_engine(model, lambda engine: contract.measure(engine, contract.make_probes(template)))


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
    with pytest.raises(ContractError, match="planted") as caught:
        contract.raise_if_failed([check], where=tiny_folder, hint="merge it again")
    assert caught.value.hint == "merge it again"


def test_equal_token_ids_and_stop_ids_pass(folder: Path, template: Template) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(template.stop_ids)}))
    assert contract.check_token_ids(template, folder).passed
    assert contract.check_stop_ids(template, folder).passed


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("'\\n'", "' '"))


def other_tokenizer(folder: Path) -> None:
    change_json(folder / "tokenizer.json", lambda state: state["model"].update(merges=state["model"]["merges"][:20]))


@pytest.mark.parametrize("change", [other_template, other_tokenizer])
def test_another_template_or_tokenizer_is_caught(
    change: Callable[[Path], None], folder: Path, template: Template
) -> None:
    change(folder)
    assert not contract.check_token_ids(template, folder).passed


def test_a_template_that_knows_no_system_message_can_be_held_to_a_contract(tiny_tokenizer: Any) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert len(contract.make_probes(Template(tiny_tokenizer, source, "no system"))) == len(contract.PROBES) - 1


def test_a_contract_that_measured_nan_is_written_and_fails(folder: Path, template: Template) -> None:
    probe_set = contract.make_probes(template)
    values = [[float("nan")] * (len(p.ids) - p.start) for p in probe_set]
    check = contract.compare_logprobs("nan", values, values, FLOAT32)
    contract.write(folder / contract.CONTRACT_FILE, template, probe_set, values, [check], form="float32", files=[])
    assert not json.loads((folder / contract.CONTRACT_FILE).read_text())["passed"]


@pytest.mark.parametrize("saved", [{}, {"eos_token_id": 0}, {"eos_token_id": [0, 1]}])
def test_a_missing_end_token_is_caught(saved: dict[str, Any], folder: Path, template: Template) -> None:
    (folder / "generation_config.json").write_text(json.dumps(saved))
    assert not contract.check_stop_ids(template, folder).passed


@pytest.fixture
def record(folder: Path, template: Template) -> Path:
    """The folder's contract, just written."""
    values = measured(load_model(folder), template)
    check = contract.compare_logprobs("again", values, values, FLOAT32)
    path = folder / contract.CONTRACT_FILE
    probe_set = contract.make_probes(template)
    files = contract.model_files(folder)
    contract.write(path, template, probe_set, values, [check], form="float32", files=files)
    return path


def verified(record: Path, model: Any) -> contract.Check:
    return with_engine(model, lambda engine: contract.verify(record, engine))


def holds(record: Path, template: Template) -> dict[str, bool]:
    return {check.name: check.passed for check in contract.check_unchanged(record, template)}


def test_a_written_contract_is_enough_to_check_the_folder_again(record: Path, template: Template) -> None:
    assert contract.read(record)["passed"]
    assert holds(record, template) == {"files": True, "template": True}
    assert verified(record, load_model(record.parent)).passed


@pytest.mark.parametrize(
    "fault",
    [lambda m: m.layers[0].mlp.up_proj.weight.mul_(1.05), lambda m: m.norm.weight.fill_(float("nan"))],
    ids=["a model that drifted", "an engine that fails on the probes"],
)
def test_the_check_of_a_contract_fails_for(fault: Callable[[Any], Any], record: Path) -> None:
    model: Any = load_model(record.parent)
    with torch.no_grad():
        fault(model.model)
    assert not verified(record, model).passed


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json", "config.json"])
def test_a_changed_or_missing_file_is_caught(record: Path, template: Template, name: str) -> None:
    path = record.parent / name
    path.write_bytes(path.read_bytes() + b" ")
    assert holds(record, template)["files"] is False
    path.unlink()
    assert holds(record, template)["files"] is False


def test_another_template_is_caught_without_computing(record: Path, template: Template) -> None:
    other = Template(template.tokenizer, template.source + "{# changed #}", "other")
    assert holds(record, other) == {"files": True, "template": False}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"version": 1}', '{"version": 2}'])
def test_no_contract_or_an_unreadable_one_is_an_error_that_names_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / contract.CONTRACT_FILE).write_text(content)
    with pytest.raises(ModelError, match="contract") as caught:
        contract.read(tmp_path / contract.CONTRACT_FILE)
    assert str(tmp_path) in str(caught.value)


def test_a_greedy_answer_carries_the_log_probabilities_that_scoring_gives_it(
    tiny_folder: Path, template: Template
) -> None:
    async def answer_and_score(engine: TransformersEngine) -> tuple[list[list[float]], list[list[float]]]:
        answers = await contract.measure_greedy(engine, contract.make_probes(template))
        return [values for _, values in answers], await contract.measure(engine, [probe for probe, _ in answers])

    answered, scored = with_engine(load_model(tiny_folder), answer_and_score)
    assert sum(map(len, answered)) > 12
    assert contract.compare_logprobs("answers", answered, scored, FLOAT32).passed


@pytest.mark.parametrize(
    ("shift", "passes"), [(-0.5, True), (0.0, True), (0.09, True), (0.2, False), (float("nan"), False)]
)
def test_a_loss_may_rise_by_what_is_allowed_and_fall_by_anything(shift: float, passes: bool) -> None:
    full = [[-1.0, -2.0], [-3.0]]
    worse = [[value - shift for value in values] for values in full]
    assert contract.compare_losses("as served", worse, full, 0.1).passed is passes
