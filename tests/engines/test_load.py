from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from corral.engines import load
from corral.engines.load import ENGINES, Name, default_engine, load_engine
from corral.errors import MissingExtraError, ModelError
from tests.engines.tiny import CONTEXT, VOCABULARY, tiny_llama

IDS = list(range(1, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_every_engine_loads_the_same_folder_and_gives_the_same_scores(folder: Path) -> None:
    async def scores(name: Name) -> list[float]:
        async with load_engine(name, folder, dtype="float32", device="cpu") as engine:
            assert engine.name == name
            assert (engine.features.vocabulary, engine.features.max_length) == (VOCABULARY, CONTEXT)
            return await engine.score(IDS)

    first, *others = [asyncio.run(scores(name)) for name in ENGINES]
    assert len(others) == 1
    for other in others:
        assert other == pytest.approx(first, abs=1e-3)


def test_the_default_is_openvino_on_a_cpu_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_engine("cpu") == "openvino"
    assert default_engine("cuda") == "transformers"
    monkeypatch.setattr(load, "find_spec", lambda name: None)
    assert default_engine("cpu") == "transformers"


def test_openvino_on_another_device_is_refused_with_both_ways_out(folder: Path) -> None:
    with pytest.raises(ModelError, match="'cuda'") as caught:
        load_engine("openvino", folder, dtype="float32", device="cuda")
    assert 'engine = "transformers"' in (caught.value.hint or "")
    assert 'device = "cpu"' in (caught.value.hint or "")


@pytest.mark.parametrize("name", ENGINES)
def test_a_folder_without_a_model_is_refused_by_every_engine(name: Name, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_engine(name, tmp_path, dtype="float32", device="cpu")


def test_without_openvino_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(MissingExtraError) as caught:
        load_engine("openvino", folder, dtype="float32", device="cpu")
    assert caught.value.hint == 'pip install "corral[openvino]"'


def test_knowing_the_engines_loads_none_of_them() -> None:
    program = """
import sys
from corral.engines.load import default_engine
default_engine("cpu")
heavy = {"torch", "transformers", "openvino", "openvino_genai"} & set(sys.modules)
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
