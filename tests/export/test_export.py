"""Exported forms are the model they were made from, and each way of being another is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from corral.errors import ContractError, InputError
from corral.export import contract, export, gguf_writer
from corral.export_forms import EXPORT_TYPES, ExportForm
from corral.model import openvino_graph
from corral.model.folder import read_json
from corral.progress import Progress
from corral.storage import sha256_file
from corral.template import Template
from tests.conftest import change_json, make_tiny_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 = LLAMA3 | {"original_max_position_embeddings": 64}


class Recorder(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def source(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a run merges it, with the rope scaling of Llama 3.1, which a wrong reader leaves out."""
    folder = tmp_path_factory.mktemp("source")
    model = make_tiny_model(len(tiny_tokenizer), rope_parameters=LLAMA31)
    template = Template.load(tiny_tokenizer, "chatml")
    model.generation_config.eos_token_id = 0  # beside the template's own end, 2
    model.save_pretrained(folder)
    template.save(folder)
    (folder / "LICENSE").write_text("Do as you like.")
    return folder


FORMS = [ExportForm(to, kind) for to, kinds in EXPORT_TYPES.items() for kind in kinds]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_form_passes_its_checks_and_carries_its_contract(source: Path, tmp_path: Path, form: ExportForm) -> None:
    assert export.export_form(source, tmp_path, form, Progress()) == form.path(tmp_path)
    assert form.path(tmp_path).exists()
    record = contract.read(form.contract_path(tmp_path))
    assert record["passed"]
    assert record["form"] == str(form)
    assert record["source"].keys() >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    assert record["template"]["stop_ids"] == [0, 2]
    assert {check["name"] for check in record["checks"]} == {
        "token ids", "stop ids", "weights", "greedy answers", "as served",
    }  # fmt: skip
    assert (form.contract_path(tmp_path).parent / "LICENSE").read_text() == "Do as you like."
    assert not list(tmp_path.glob("candidate*"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", [ExportForm("gguf", "f16"), ExportForm("openvino", "f32")], ids=str)
def test_a_head_that_config_json_denies_is_exported(source: Path, tmp_path: Path, form: ExportForm) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    change_json(folder / "config.json", tie_word_embeddings=True)
    export.export_form(folder, tmp_path, form, Progress())
    assert contract.read(form.contract_path(tmp_path))["passed"]


def test_openvino_genai_is_given_the_ids_and_no_other_setting_of_generation(source: Path, tmp_path: Path) -> None:
    form = ExportForm("openvino", "int8")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    change_json(folder / "generation_config.json", repetition_penalty=1.3, max_new_tokens=5, pad_token_id=1)
    export.export_form(folder, tmp_path, form, Progress())
    written = read_json(form.path(tmp_path) / "generation_config.json")
    assert written == {"bos_token_id": 1, "pad_token_id": 1, "eos_token_id": [0, 2]}


def leave_out_rope_scaling(patch: pytest.MonkeyPatch) -> None:
    real = openvino_graph._rope  # pyright: ignore[reportPrivateUsage]

    def plain(config: Any) -> Any:
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        return real(config)

    patch.setattr(openvino_graph, "_rope", plain)
    patch.setattr(gguf_writer, "llama3_divisors", lambda config: np.ones(config.head_dim // 2, np.float32))


def permute_wrongly(patch: pytest.MonkeyPatch) -> None:
    """OpenVINO's query and key rows as GGUF has them, and GGUF's as transformers has them."""
    permute = gguf_writer.permute_rotary_rows
    real = openvino_graph._Graph.weight  # pyright: ignore[reportPrivateUsage]

    def weight(self: Any, name: str) -> Any:
        read = self.read
        if "q_proj" in name or "k_proj" in name:
            self.read = lambda name: permute(read(name), self.head_size)
        try:
            return real(self, name)
        finally:
            self.read = read

    patch.setattr(openvino_graph._Graph, "weight", weight)  # pyright: ignore[reportPrivateUsage]
    patch.setattr(gguf_writer, "permute_rotary_rows", lambda rows, head_dim: rows)


@pytest.mark.parametrize(
    "form", [ExportForm("openvino", "f32"), ExportForm("openvino", "int4"), ExportForm("gguf", "f16")], ids=str
)
@pytest.mark.parametrize("fault", [leave_out_rope_scaling, permute_wrongly])
def test_a_form_that_computes_something_else_is_refused_and_kept_as_a_candidate(
    source: Path,
    tmp_path: Path,
    form: ExportForm,
    fault: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(ContractError, match="weights") as caught:
        export.export_form(source, tmp_path, form, Progress())
    assert not form.path(tmp_path).exists()
    (candidate,) = tmp_path.glob("candidate*")
    assert str(candidate) in str(caught.value)
    assert not contract.read(candidate / form.contract_path(candidate).name)["passed"]


def without_end(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=0)


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", " <|im_end|>"))


@pytest.mark.parametrize("form", [ExportForm("openvino", "f32"), ExportForm("gguf", "f16")], ids=str)
@pytest.mark.parametrize(("fault", "name"), [(without_end, "stop ids"), (other_template, "token ids")])
def test_a_form_with_another_tokenizer_template_or_stop_id_is_refused(
    source: Path,
    tmp_path: Path,
    form: ExportForm,
    fault: Callable[[Path], None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = {"gguf": "_gguf_candidate", "openvino": "_openvino_candidate"}[form.target]
    real = getattr(export, make)

    def faulty(folder: Path, candidate: Path, form: ExportForm, template: Template, progress: Progress) -> Any:
        wrong = Path(shutil.copytree(folder, tmp_path / "wrong"))
        fault(wrong)
        return real(wrong, candidate, form, _template_of(wrong), progress)

    monkeypatch.setattr(export, make, faulty)
    with pytest.raises(ContractError, match=name):
        export.export_form(source, tmp_path / "out", form, Progress())


def _template_of(folder: Path) -> Template:
    from corral.model.loading import load_tokenizer

    return Template.load(load_tokenizer(folder))


def test_a_current_export_is_kept_and_a_stale_one_is_made_again(source: Path, tmp_path: Path) -> None:
    form = ExportForm("openvino", "f32")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    output = Recorder()

    def export_again() -> Path:
        return export.export_form(folder, tmp_path / "out", form, output) / openvino_graph.MODEL_FILE

    before = export_again().stat().st_mtime_ns
    assert export_again().stat().st_mtime_ns == before
    assert "already done" in output.lines[-1]
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"model.norm.weight": 1.1 * weights["model.norm.weight"]},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    changed = export_again()
    assert changed.stat().st_mtime_ns != before
    changed.with_suffix(".bin").unlink()
    assert export_again().with_suffix(".bin").is_file()


def end_at_another_token(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[0, 7])


def rotate_otherwise(folder: Path) -> None:
    change_json(folder / "config.json", rope_parameters=LLAMA31 | {"rope_theta": 777.0})


@pytest.mark.parametrize(
    ("change", "expected"),
    [(end_at_another_token, [0, 2, 7]), (rotate_otherwise, [0, 2])],
)
def test_an_export_is_made_again_after_a_change_beside_the_weights(
    source: Path, tmp_path: Path, change: Callable[[Path], None], expected: list[int]
) -> None:
    form = ExportForm("gguf", "f16")
    folder = Path(shutil.copytree(source, tmp_path / "model"))
    export.export_form(folder, tmp_path, form, Progress())
    before = sha256_file(form.path(tmp_path))
    change(folder)
    export.export_form(folder, tmp_path, form, Progress())
    assert contract.read(form.contract_path(tmp_path))["template"]["stop_ids"] == expected
    assert sha256_file(form.path(tmp_path)) != before
    output = Recorder()
    export.export_form(folder, tmp_path, form, output)
    assert "already done" in output.lines[0]


def test_forms_are_copied_from_an_older_export(source: Path, tmp_path: Path) -> None:
    forms = [ExportForm("openvino", "f32"), ExportForm("gguf", "q8_0")]
    for form in forms:
        export.export_form(source, tmp_path / "old", form, Progress())
    (tmp_path / "new").mkdir()
    for form in forms:
        form.copy_missing_from(tmp_path / "old", tmp_path / "new")
        output = Recorder()
        export.export_form(source, tmp_path / "new", form, output)
        assert "already done" in output.lines[0]


def test_an_unknown_type_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(InputError, match="q8_0") as caught:
        ExportForm("openvino", "q8_0")
    assert "int8, int4" in str(caught.value)
