"""`corral export` and `corral verify`."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from tests.e2e.conftest import fail, succeed
from tests.forked import corral


def test_a_form_is_added_to_run_recipe_and_report_and_damage_is_noticed(run_copy: Path) -> None:
    run = run_copy
    gguf, openvino = forms = [run / "export" / "model-f16.gguf", run / "export" / "openvino-int8"]
    assert str(gguf) in succeed("export", run, "--to", "gguf", "--type", "f16").stdout
    modified = gguf.stat().st_mtime_ns
    second = succeed("export", run, "--to", "openvino", "--json")
    assert json.loads(second.stdout)["exported"] == [str(form) for form in forms]
    assert gguf.stat().st_size
    assert gguf.stat().st_mtime_ns >= modified
    assert "model-f16.gguf: already done" in second.stderr
    assert tomllib.loads((run / "recipe.toml").read_text())["export"] == {"gguf": ["f16"], "openvino": ["int8"]}
    page = (run / "report" / "index.html").read_text("utf-8")
    assert "gguf f16: ✓ passed" in page
    assert "openvino int8: ✓ passed" in page
    assert "already done: " in succeed("export", run).stderr

    for model in (run, *forms):
        assert succeed("verify", model).stdout.count("holds") == 5

    weights = openvino / "openvino_model.bin"
    weights.write_bytes(weights.read_bytes()[:-64] + bytes(64))
    broken = fail(4, ["contract broken"], "verify", openvino)
    assert "BROKEN  files: changed or missing: openvino_model.bin" in broken.stdout
    for verb in ("serve", "chat"):
        fail(4, ["openvino_model.bin"], verb, openvino)
    succeed("verify", run, "--engine", "openvino")
    (run / "train-1-sft" / "merged" / "generation_config.json").write_text("{}")
    fail(4, [], "verify", run)


def test_a_model_outside_a_run_is_exported_to_the_given_folder(finished_run: Path, tmp_path: Path) -> None:
    model = finished_run / "train-1-sft" / "merged"
    done = succeed("export", model, "--to", "gguf", "--type", "q8_0", "--out", tmp_path / "out")
    assert done.stdout.strip() == f"export  {tmp_path / 'out' / 'model-q8_0.gguf'}"


FAULTS = {
    "a type of another form": (("--to", "gguf", "--type", "int8"), ("'int8'", "q8_0")),
    "a type without a form": (("--type", "q8_0"), ("q8_0", "--to gguf")),
    "nothing to export": ((), ("no format", "--to")),
    "--out for a run": (("--to", "gguf", "--out", "elsewhere"), ("--out",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_option_is_one_clear_error(fault: str, finished_run: Path, tmp_path: Path) -> None:
    options, expected = FAULTS[fault]
    fail(2, expected, "export", finished_run, *options, cwd=tmp_path)
    assert not (finished_run / "export").exists()


@pytest.mark.parametrize("options", [(), ("--to", "gguf"), ("--out", "elsewhere")])
def test_a_model_outside_a_run_needs_a_form_and_a_folder(
    options: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    fail(2, ["--to", "--out"], "export", tiny_folder, *options, cwd=tmp_path)


def test_a_model_without_a_contract_cannot_be_verified(tiny_folder: Path) -> None:
    fail(2, ["no contract"], "verify", tiny_folder)


def test_a_failed_export_leaves_the_recipe_unchanged(run_copy: Path) -> None:
    before = (run_copy / "recipe.toml").read_text()
    (run_copy / "export").write_text("in the way")
    done = corral("export", run_copy, "--to", "gguf", "--type", "f16")
    assert done.returncode != 0
    assert (run_copy / "recipe.toml").read_text() == before


def test_running_the_recipe_again_keeps_an_added_form(run_copy: Path) -> None:
    succeed("export", run_copy, "--to", "gguf", "--type", "f16")
    again = succeed("run", run_copy.parent / "r.toml", "--out", run_copy)
    assert (run_copy / "export" / "model-f16.gguf").is_file()
    assert "export" in again.stderr.partition("already done: ")[2]


def test_transformers_refuses_an_openvino_form(run_copy: Path) -> None:
    succeed("export", run_copy, "--to", "openvino", "--type", "f32")
    fail(2, ["OpenVINO's form"], "verify", run_copy / "export" / "openvino-f32", "--engine", "transformers")
