"""`corral export` and `corral verify`, as a person types them."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from tests.e2e.conftest import corral


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def test_a_form_is_added_to_the_run_its_recipe_and_its_report_and_earlier_forms_stay(run: Path) -> None:
    first = corral("export", run, "--to", "gguf", "--type", "f16")
    assert first.returncode == 0, first.stderr
    assert str(run / "export" / "model-f16.gguf") in first.stdout
    made = (run / "export" / "model-f16.gguf").stat().st_mtime_ns
    second = corral("export", run, "--to", "openvino", "--json")
    assert second.returncode == 0, second.stderr
    places = [run / "export" / "model-f16.gguf", run / "export" / "openvino-int8"]
    assert json.loads(second.stdout)["exported"] == [str(place) for place in places]
    assert places[0].stat().st_size
    assert places[0].stat().st_mtime_ns >= made
    assert "model-f16.gguf: already done" in second.stderr
    assert tomllib.loads((run / "recipe.toml").read_text())["export"] == {"gguf": ["f16"], "openvino": ["int8"]}
    page = (run / "report" / "index.html").read_text("utf-8")
    assert "gguf f16: ✓ passed" in page
    assert "openvino int8: ✓ passed" in page
    again = corral("export", run)
    assert again.returncode == 0
    assert "already done: " in again.stderr

    for place in (run, *places):
        held = corral("verify", place)
        assert held.returncode == 0, held.stderr
        assert held.stdout.count("holds") == 5

    damaged = places[1] / "openvino_model.bin"
    damaged.write_bytes(damaged.read_bytes()[:-64] + bytes(64))
    broken = corral("verify", places[1])
    assert broken.returncode == 4
    assert "BROKEN  files: changed or missing: openvino_model.bin" in broken.stdout
    assert "contract broken" in broken.stderr
    for verb in ("serve", "chat"):
        refused = corral(verb, places[1])
        assert refused.returncode == 4
        assert "openvino_model.bin" in refused.stderr
    assert corral("verify", run, "--engine", "openvino").returncode == 0
    (run / "merge" / "model" / "generation_config.json").write_text("{}")
    assert corral("verify", run).returncode == 4


def test_a_model_that_is_no_run_is_exported_to_where_the_user_says(finished: Path, tmp_path: Path) -> None:
    folder = finished / "run" / "merge" / "model"
    done = corral("export", folder, "--to", "gguf", "--type", "q8_0", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"export  {tmp_path / 'out' / 'model-q8_0.gguf'}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--to", "gguf", "--type", "int8"), ("'int8'", "q8_0")),
        (("--type", "q8_0"), ("q8_0", "--to gguf")),
        ((), ("no other form", "--to")),
    ],
    ids=["a type of another form", "a type of nothing", "nothing to do"],
)
def test_a_mistake_is_one_clear_error(run: Path, options: tuple[str, ...], says: tuple[str, ...]) -> None:
    done = corral("export", run, *options)
    assert done.returncode == 2
    assert all(word in done.stderr for word in says)
    assert "Traceback" not in done.stderr
    assert not (run / "export").exists()


def test_a_model_without_a_run_needs_a_form_and_a_place(tiny_folder: Path, tmp_path: Path) -> None:
    for options in ((), ("--to", "gguf"), ("--out", tmp_path)):
        done = corral("export", tiny_folder, *options)
        assert done.returncode == 2
        assert "--to" in done.stderr
        assert "--out" in done.stderr


def test_a_model_without_a_contract_cannot_be_verified(tiny_folder: Path) -> None:
    done = corral("verify", tiny_folder)
    assert done.returncode == 2
    assert "no contract" in done.stderr


def test_a_form_that_fails_leaves_the_recipe_as_it_was(run: Path) -> None:
    before = (run / "recipe.toml").read_text()
    (run / "export").write_text("in the way")
    done = corral("export", run, "--to", "gguf", "--type", "f16")
    assert done.returncode != 0
    assert (run / "recipe.toml").read_text() == before


def test_running_the_recipe_again_keeps_a_form_that_was_added(run: Path, finished: Path) -> None:
    assert corral("export", run, "--to", "gguf", "--type", "f16").returncode == 0
    again = corral("run", finished / "r.toml", "--out", run)
    assert again.returncode == 0, again.stderr
    assert (run / "export" / "model-f16.gguf").is_file()
    assert "export" in again.stderr.partition("already done: ")[2]


def test_an_openvino_form_cannot_be_given_to_transformers_and_an_out_is_refused_for_a_run(run: Path) -> None:
    assert corral("export", run, "--to", "openvino", "--type", "f32").returncode == 0
    wrong = corral("verify", run / "export" / "openvino-f32", "--engine", "transformers")
    assert wrong.returncode == 2
    assert "OpenVINO's form" in wrong.stderr
    out = corral("export", run, "--to", "gguf", "--out", run / "elsewhere")
    assert out.returncode == 2
    assert "--out" in out.stderr
