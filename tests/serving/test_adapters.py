"""Adapters come and go while the server runs, for its administrator alone, and from one folder alone."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from corral.engines.base import Sampling
from corral.serving.adapters import AdapterFolder, build_router
from corral.serving.admission import Admission
from corral.serving.keys import KeyStore
from corral.serving.model_loading import ModelOptions, open_served_models
from corral.serving.models import ServedModels
from corral.serving.protocol import Refused
from tests.engines.tiny import write_adapter
from tests.serving.conftest import JSON, RunningServer, Serve, bearer

ASKED: Any = [{"role": "user", "content": "Hello"}]
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two adapters of the tiny model, a link to one outside, and what is no adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    outside = write_adapter(tiny_folder, tmp_path_factory.mktemp("outside") / "secret", 3)
    for number, name in enumerate(("cook", "poet"), start=1):
        write_adapter(tiny_folder, folder / name, number)
    (folder / "link").symlink_to(outside)
    (folder / "empty").mkdir()
    return folder


def open_tiny(tiny_folder: Path, *adapters: Path) -> ServedModels:
    return open_served_models(ModelOptions([f"m={tiny_folder}", *map(str, adapters)], "transformers"))


def answer(running: RunningServer, model: str) -> str:
    given: Any = {"temperature": 0, "max_tokens": 16}
    return running.client.chat.completions.create(model=model, messages=ASKED, **given).choices[0].message.content or ""


def test_an_adapter_is_loaded_answers_as_one_from_the_start_and_is_unloaded(
    tiny_folder: Path, folder: Path, serve: Serve
) -> None:
    expected = open_tiny(tiny_folder, folder / "poet", folder / "cook")
    from_the_start = serve(expected)
    models = open_tiny(tiny_folder)
    running = serve(models, routers=[build_router(models, folder)])
    before = answer(running, "m")
    for name in ("poet", "cook"):
        status, text, _ = running.call("POST", LOAD, {"lora_name": f"my/{name}", "lora_path": name})
        assert (status, text) == (200, f"Success: LoRA adapter 'my/{name}' added successfully.")
        assert answer(running, f"my/{name}") == answer(from_the_start, name) != before
    assert answer(running, "m") == before, "the base is what it was"
    assert [model.id for model in running.client.models.list()] == ["m", "my/poet", "my/cook"]
    assert running.call("POST", UNLOAD, {"lora_name": "my/poet"})[0] == 200
    status, error, _ = running.chat(model="my/poet")
    assert (status, error["error"]["code"]) == (404, "model_not_found")
    assert answer(running, "my/cook") == answer(from_the_start, "cook")
    assert running.call("POST", LOAD, {"lora_name": "my/poet", "lora_path": str(folder / "poet")})[0] == 200
    assert answer(running, "my/poet") == answer(from_the_start, "poet")
    for each in (models, expected):
        asyncio.run(each.close())


async def test_a_request_of_an_unloaded_adapter_ends_as_usual_and_its_weights_are_freed(
    tiny_folder: Path, folder: Path
) -> None:
    models = open_tiny(tiny_folder)
    adapters = AdapterFolder(models, folder)
    await adapters.load("poet", "poet")
    served = models.get("poet")
    engine: Any = served.answerer.engine
    sampling = Sampling(300, temperature=1.0, seed=1)
    (expected,) = await engine.submit([5], sampling).completions()
    with models.use(served):
        running = asyncio.create_task(engine.submit([5], sampling).completions())
        await adapters.unload("poet")
        await asyncio.sleep(0.05)
        assert await running == [expected]
    while engine._shared.model.peft_config:
        await asyncio.sleep(0.02)
    assert not [name for name, _ in engine._shared.model.named_parameters() if "lora" in name]
    await models.close()


@pytest.mark.parametrize("path", ["nowhere", "link", "../outside", "/etc", "..", "cook/../../x", "a\x00b"])
async def test_what_lies_outside_the_folder_is_not_told_from_what_does_not_exist(
    path: str, tiny_folder: Path, folder: Path, serve: Serve
) -> None:
    adapters = AdapterFolder(ServedModels([serve.model("Hello")]), folder)
    with pytest.raises(Refused, match="in this server's folder of adapters") as caught:
        await adapters.load("x", path)
    assert caught.value.status == 404


async def test_what_cannot_be_loaded_is_refused_and_leaves_nothing_behind(
    tiny_folder: Path, folder: Path, tmp_path: Path, serve: Serve
) -> None:
    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    (folder / "foreign").mkdir(exist_ok=True)
    write_adapter(other, folder / "foreign", 4)
    models = open_tiny(tiny_folder)
    adapters = AdapterFolder(models, folder)
    for name, path, part in (
        ("x", "empty", "adapter_config.json"),
        ("x", "foreign", "no model that is loaded is the base"),
        ("m", "cook", "a model called 'm' already"),
    ):
        with pytest.raises(Refused, match=part) as caught:
            await adapters.load(name, path)
        assert caught.value.status == 400
    with pytest.raises(Refused, match="no adapter called 'm'") as caught:
        await adapters.unload("m")
    assert caught.value.status == 404
    assert [each.name for each in models.all()] == ["m"]
    await models.close()


async def test_an_engine_that_loads_no_adapters_is_named(tiny_folder: Path, folder: Path, serve: Serve) -> None:
    models = open_tiny(tiny_folder)
    opened = models.get("m").opened
    assert opened is not None
    scripted = serve.model("Hello")
    named = replace(scripted, opened=replace(opened, answerer=scripted.answerer))
    with pytest.raises(Refused, match="engine 'scripted' loads no adapters") as caught:
        await AdapterFolder(ServedModels([named]), folder).load("x", "cook")
    assert caught.value.status == 400
    await models.close()


def test_only_an_administrators_key_loads_and_unloads(keys: KeyStore, folder: Path, serve: Serve) -> None:
    _, user = keys.add("alice")
    _, admin = keys.add("root", is_admin=True)
    models = ServedModels([serve.model("Hello")])
    running = serve(models, Admission(keys=keys), routers=[build_router(models, folder)])
    for path, body in ((LOAD, {"lora_name": "x", "lora_path": "nowhere"}), (UNLOAD, {"lora_name": "x"})):
        given = [running.call("POST", path, body, {**JSON, **bearer(key)})[0] for key in (user, admin)]
        assert given == [403, 404]
        assert running.call("POST", path, body)[0] == 401


@pytest.mark.parametrize(
    "body",
    [
        {"lora_name": "x"},
        {"lora_name": "a b", "lora_path": "cook"},
        {"lora_name": "x" * 200, "lora_path": "cook"},
        {"lora_name": "x", "lora_path": ""},
        {"lora_name": "x", "lora_path": "y" * 2000},
    ],
)
def test_a_malformed_request_is_refused(body: dict[str, str], folder: Path, serve: Serve) -> None:
    models = ServedModels([serve.model("Hello")])
    running = serve(models, routers=[build_router(models, folder)])
    assert running.call("POST", LOAD, body)[0] == 400
