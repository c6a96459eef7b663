"""One tiny recipe from the command line, for each way of holding and training weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from corral import cli
from tests.e2e.conftest import RECIPE

QUICK = 'answer_rows = 1\nengine = "transformers"'
ADAPTED = "[train.lora]\nrank = 4\n"
FORMS = {
    "nf4": (ADAPTED, 'quantization = "nf4"\nmerge = "best"\n' + ADAPTED, ["choice of the merge"]),
    "int8": (ADAPTED, 'quantization = "int8"\n' + ADAPTED, ["held-out loss, merged and int8"]),
    "full": (ADAPTED, 'method = "full"\n', ["trained and saved model"]),
    "full, bfloat16": (ADAPTED, 'method = "full"\n', ["trained and saved model", "loss, saved model and training"]),
}


def run(folder: Path, form: str) -> int:
    old, new, _ = FORMS[form]
    assert old in RECIPE
    recipe = folder / "r.toml"
    text = recipe.read_text().replace(old, new).replace("answer_rows = 6", QUICK)
    recipe.write_text(text.replace("[model]", f'[model]\ndtype = "{dtype(form)}"'))
    return cli.main(["run", str(recipe), "--out", str(folder / "run")])


def dtype(form: str) -> str:
    return form.partition(", ")[2] or "float32"


@pytest.mark.parametrize("form", FORMS)
def test_a_recipe_runs_from_rows_to_a_model_with_a_contract(
    form: str, workspace: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = workspace()
    assert run(folder, form) == 0, capsys.readouterr()
    record = json.loads((folder / "run/merge/model/contract.json").read_text())
    first = "trained and saved weights" if form.startswith("full") else "adapter and merged model"
    assert record["passed"]
    assert [c["name"] for c in record["checks"]][2:] == [first, *FORMS[form][2]]
    told = capsys.readouterr().err
    for check in record["checks"]:
        assert check["detail"] in " ".join(told.split())
    config = json.loads((folder / "run/merge/model/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == dtype(form)
    scores = json.loads((folder / "run/evaluate/scorecard.json").read_text())["variants"]
    assert scores["tuned"]["metrics"]["loss"]["mean"] < scores["base"]["metrics"]["loss"]["mean"] - 0.5


def test_a_second_stage_quantises_what_the_first_one_left(workspace: Callable[[], Path]) -> None:
    folder = workspace()
    recipe = folder / "r.toml"
    text = recipe.read_text().replace("steps = 8", 'steps = 4\nquantization = "nf4"')
    head, stage, tail = text.partition("[[train]]")
    body, evaluate, rest = tail.partition("[evaluate]")
    recipe.write_text(head + stage + body + stage + body + evaluate + rest.replace("answer_rows = 6", QUICK))
    assert cli.main(["run", str(recipe), "--out", str(folder / "run")]) == 0
    adapter = json.loads((folder / "run/train-2-sft/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(folder / "run/train-1-sft/merged")
    assert json.loads((folder / "run/merge/model/contract.json").read_text())["passed"]


def test_without_bitsandbytes_nothing_is_begun(
    workspace: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder = workspace()
    assert run(folder, "nf4") == 3
    assert 'pip install "corral[quant]"' in capsys.readouterr().err
    assert not (folder / "run/prepare/ledger.json").exists()
