from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from corral.engines import registry
from corral.engines.base import Sampling
from corral.engines.registry import LOCAL_ENGINES, LocalEngine, default_engine, load_engine, load_engines
from corral.errors import MissingExtraError, ModelError
from corral.model import adapters, merging, packed_forward
from corral.model.loading import load_model
from tests.conftest import make_tiny_model
from tests.engines.tiny import CONTEXT, VOCABULARY, generated, tiny_llama
from tests.model.tiny import ADAPTER_KINDS, write_by_peft

IDS = list(range(1, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORRAL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def test_engines_load_the_same_folder_and_give_the_same_scores(folder: Path) -> None:
    async def scores(name: LocalEngine) -> list[float]:
        async with load_engine(name, folder, dtype="float32", device="cpu") as engine:
            assert engine.name == name
            assert (engine.features.vocabulary, engine.features.max_length) == (VOCABULARY, CONTEXT)
            return await engine.score(IDS)

    # vLLM has an environment of its own: test_vllm.py
    assert asyncio.run(scores("openvino")) == pytest.approx(asyncio.run(scores("transformers")), abs=1e-3)


def test_the_default_is_the_fastest_that_is_installed_and_can_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"openvino_genai", "vllm"}
    monkeypatch.setattr(registry, "find_spec", lambda name: name in installed or None)
    assert default_engine("cpu") == "openvino"
    assert default_engine("cuda") == "vllm"
    assert default_engine("cpu", adapter=True) == "transformers"
    assert default_engine("cuda", adapter=True) == "vllm"
    installed.clear()
    assert default_engine("cpu") == default_engine("cuda") == "transformers"


def test_an_adapter_for_openvino_is_refused_with_the_ways_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapters") as caught:
        load_engine("openvino", folder, dtype="float32", device="cpu", adapter=tmp_path)
    assert "transformers" in (caught.value.hint or "")
    assert "merged" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("of", "message"), [({"hidden_size": 32}, "32"), ({"num_hidden_layers": 3}, "layers.2")], ids=["narrower", "deeper"]
)
def test_an_adapter_of_another_model_is_refused(
    folder: Path, tmp_path: Path, name: LocalEngine, of: dict[str, int], message: str
) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(make_tiny_model(VOCABULARY, **of), lora).save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=f"does not fit.*{message}") as caught:
        load_engine(name, folder, dtype="float32", device="cpu", adapter=tmp_path)
    assert "base_model_name_or_path" in (caught.value.hint or "")


KINDS = ["dora", "all biases", "whole modules", "tokens", "tied head", "parameters", "resized tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_answers_as_peft_computes_it_beside_its_base_and_another(
    kind: str, tmp_path: Path
) -> None:
    of_model, settings = ADAPTER_KINDS[kind]
    folder, own, plain = tmp_path / "base", tmp_path / "own", tmp_path / "plain"
    make_tiny_model(300, **of_model).save_pretrained(folder)
    expected: dict[Path | None, list[float]] = {
        own: write_by_peft(own, folder, load_model(folder), ids=IDS, **settings),
        plain: write_by_peft(plain, folder, load_model(folder), ids=IDS),
        None: packed_forward.score(load_model(folder), [IDS], [1])[0],
    }
    merged = {adapter: merging.merge_adapter(adapters.load(load_model(folder), adapter)) for adapter in (own, plain)}
    prompt = IDS[:9]
    answers: dict[Path | None, list[int]] = {adapter: generated(model, prompt, 6) for adapter, model in merged.items()}
    answers[None] = generated(load_model(folder), prompt, 6)

    async def check() -> None:
        order = [None, own, plain]
        engines = load_engines("transformers", folder, dtype="float32", device="cpu", adapters=order)
        for adapter, engine in [*zip(order, engines, strict=True)] * 2:
            assert await engine.score(IDS) == pytest.approx(expected[adapter], abs=1e-4)
            (done,) = await engine.submit(prompt, Sampling(max_tokens=6)).completions()
            assert [*done.ids] == answers[adapter]
        for engine in engines:
            await engine.close()

    asyncio.run(check())
    assert expected[own] != pytest.approx(expected[None], abs=1e-2)


def test_an_adapter_that_was_never_trained_is_not_served_in_place_of_its_base(folder: Path, tmp_path: Path) -> None:
    adapted: Any = get_peft_model(load_model(folder), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match="every B is zero") as caught:
        load_engine("transformers", folder, dtype="float32", device="cpu", adapter=tmp_path)
    assert str(folder) in (caught.value.hint or "")


def test_openvino_on_another_device_is_refused_with_both_ways_out(folder: Path) -> None:
    with pytest.raises(ModelError, match="'cuda'") as caught:
        load_engine("openvino", folder, dtype="float32", device="cuda")
    assert 'engine = "transformers"' in (caught.value.hint or "")
    assert 'device = "cpu"' in (caught.value.hint or "")


@pytest.mark.parametrize("name", LOCAL_ENGINES)
def test_a_folder_without_a_model_is_refused_by_every_engine(name: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load_engine(name, tmp_path, dtype="float32", device="cpu")


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino_genai"), ("vllm", "vllm")])
def test_where_an_engine_is_missing_its_extra_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: LocalEngine, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as caught:
        load_engine(name, folder, dtype="float32", device="cpu")
    assert caught.value.hint == f'pip install "corral[{name}]"'


def test_knowing_the_engines_loads_none_of_them() -> None:
    program = """
import sys
from corral.engines.registry import default_engine
default_engine("cpu")
heavy = {"torch", "transformers", "openvino", "openvino_genai", "vllm", "httpx2"} & set(sys.modules)
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
