"""`corral merge`: an adapter and its base become a model folder like a run's, with a contract, or nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from corral.errors import InputError, ModelError
from corral.export import contract
from corral.export.merge import merge
from corral.model import packed_forward
from corral.model.loading import load_model, load_template
from corral.progress import Progress
from tests.conftest import change_json
from tests.model.tiny import ADAPTER_KINDS, write_by_peft

IDS = list(range(3, 40))


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    (folder / "LICENSE").write_text("of the base")
    return folder


@pytest.mark.parametrize("kind", ["dora", "resized whole modules"])
def test_a_merged_adapter_is_a_whole_model_folder_that_gives_pefts_log_probabilities(
    kind: str, base: Path, tmp_path: Path
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    settings = ADAPTER_KINDS[kind][1] | ({"resize": 403} if "resize" in ADAPTER_KINDS[kind][1] else {})
    expected = write_by_peft(adapter, base, load_model(base), ids=IDS, **settings)
    (adapter / "NOTICE").write_text("of the adapter")
    source = (base / "chat_template.jinja").read_text("utf-8")
    (adapter / "chat_template.jinja").write_text("{{ 'Please. ' }}" + source)
    checks = merge(str(adapter), out, Progress())
    assert [check.name for check in checks] == ["token ids", "stop ids", "adapter and merged model"]
    model: Any = load_model(out)
    assert packed_forward.score(model, [IDS], [1])[0] == pytest.approx(expected, abs=1e-4)
    template = load_template(out)
    assert all(check.passed for check in contract.check_unchanged(out / contract.CONTRACT_FILE, template))
    assert template.source.startswith("{{ 'Please. ' }}")
    assert ((out / "LICENSE").read_text(), (out / "NOTICE").read_text()) == ("of the base", "of the adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_the_merged_model_has_the_dtype_of_its_base(base: Path, tmp_path: Path) -> None:
    model: Any = load_model(base, dtype="bfloat16")
    model.save_pretrained(base)
    write_by_peft(tmp_path / "adapter", base, model, ids=IDS)
    merge(str(tmp_path / "adapter"), tmp_path / "out", Progress())
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    record = json.loads((tmp_path / "out" / "contract.json").read_text())
    assert (record["form"], record["passed"]) == ("bfloat16", True)


def test_another_base_may_be_named(base: Path, tmp_path: Path) -> None:
    write_by_peft(tmp_path / "adapter", base, load_model(base), ids=IDS)
    change_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="/gone")
    with pytest.raises(ModelError, match="/gone"):
        merge(str(tmp_path / "adapter"), tmp_path / "out", Progress())
    merge(str(tmp_path / "adapter"), tmp_path / "out", Progress(), base=str(base))


def test_nothing_is_overwritten(base: Path, tmp_path: Path) -> None:
    write_by_peft(tmp_path / "adapter", base, load_model(base), ids=IDS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        merge(str(tmp_path / "adapter"), tmp_path / "out", Progress())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_model_that_is_no_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not an adapter"):
        merge(str(base), tmp_path / "out", Progress())
    assert not (tmp_path / "out").exists()
