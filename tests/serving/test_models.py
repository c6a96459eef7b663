"""The models of a running server: names and aliases, and when a model that went is closed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import APIRouter

from corral.answering.answerer import Answerer
from corral.engines.embedding import ASSET, Embedder
from corral.engines.scripted import ScriptedEngine
from corral.errors import InputError
from corral.serving.models import ServedModel, ServedModels
from corral.serving.protocol import Refused
from corral.template import Template
from tests.serving.conftest import Endless, Serve

ASKED: Any = [{"role": "user", "content": "Hello"}]


class Watched(ScriptedEngine):
    """An engine that says whether it was closed, and how often."""

    closings = 0

    async def close(self) -> None:
        self.closings += 1
        await super().close()


@pytest.fixture
def model(tiny_template: Template) -> Any:
    """`model(name, engine)` is a served model."""
    return lambda name, engine: ServedModel(Answerer(engine, tiny_template), name)


# Names


def test_an_alias_is_another_name_of_a_model_over_http(serve: Serve) -> None:
    models = ServedModels([serve.model("Hello")], Embedder(), {"gpt-4o-mini": "m", "text-embedding-3-small": ASSET})
    running = serve(models)
    answer = running.client.chat.completions.create(model="gpt-4o-mini", messages=ASKED)
    assert (answer.choices[0].message.content, answer.model) == ("Hello", "m")
    assert running.client.completions.create(model="gpt-4o-mini", prompt="Hello").choices[0].text == "Hello"
    listed = {model.id: model for model in running.client.models.list()}
    assert [*listed] == ["m", ASSET, "gpt-4o-mini", "text-embedding-3-small"]
    assert [(each.to_dict()["alias_of"], each.to_dict()["task"]) for each in listed.values()] == [
        (None, "chat"),
        (None, "embeddings"),
        ("m", "chat"),
        (ASSET, "embeddings"),
    ]
    assert running.client.models.retrieve("gpt-4o-mini").id == "gpt-4o-mini"
    assert models.is_embedding_model("text-embedding-3-small")
    assert not models.is_embedding_model("gpt-4o-mini")


@pytest.mark.parametrize(("alias", "name", "part"), [("m", "m", "name of a model"), ("x", "other", "no model 'other'")])
def test_an_alias_that_cannot_be_used_is_one_clear_error(alias: str, name: str, part: str, serve: Serve) -> None:
    with pytest.raises(InputError, match=part) as caught:
        ServedModels([serve.model("Hello")], aliases={alias: name})
    assert f"--alias {alias}={name}" in str(caught.value)


# Models that go


async def test_a_removed_model_is_closed_when_its_last_request_ends(model: Any) -> None:
    engine, stays = Watched([1]), Watched([2])
    models = ServedModels([model("goes", engine), model("stays", stays)])
    goes = models.get("goes")
    with models.use(goes):
        with models.use(goes):
            models.remove("goes")
            with pytest.raises(Refused, match="'stays'"):
                models.get("goes")
        await asyncio.sleep(0)
        assert not engine.closings, "another request uses it"
    await asyncio.sleep(0)
    assert engine.closings == 1
    assert [each.name for each in models.all()] == ["stays"]
    await models.close()
    assert (engine.closings, stays.closings) == (1, 1)


async def test_a_replaced_model_without_requests_is_closed_at_once_and_new_requests_get_the_other(model: Any) -> None:
    before, after = Watched([1]), Watched([2])
    models = ServedModels([model("m", before)])
    models.add(model("m", after))
    await asyncio.sleep(0)
    assert (before.closings, after.closings) == (1, 0)
    assert models.get("m").answerer.engine is after
    await models.close()


async def test_an_engine_that_another_name_still_uses_stays_open(model: Any) -> None:
    engine = Watched([1])
    models = ServedModels([model("a", engine), model("b", engine)])
    models.remove("a")
    await asyncio.sleep(0)
    assert not engine.closings
    await models.close()
    assert engine.closings == 1


async def test_closing_all_closes_also_what_a_running_request_still_uses(model: Any) -> None:
    engine, other = Watched([1]), Watched([2])
    models = ServedModels([model("m", engine)])
    with models.use(models.get("m")):
        models.add(model("m", other))
        await models.close()
        assert (engine.closings, other.closings) == (1, 1)


def test_a_stream_goes_on_with_its_model_when_that_is_replaced(serve: Serve) -> None:
    endless = Endless()
    models = ServedModels([serve.model(endless.engine)])
    router = APIRouter()

    @router.post("/replace")
    async def replace() -> None:  # pyright: ignore[reportUnusedFunction]
        models.add(serve.model("Another"))

    running = serve(models, routers=[router])
    with running.client.chat.completions.create(model="m", messages=ASKED, stream=True) as stream:
        chunks = iter(stream)
        next(chunks)
        assert running.call("POST", "/replace", {})[0] == 200
        assert running.chat()[1]["choices"][0]["message"]["content"] == "Another"
        drawn = endless.drawn
        while endless.drawn < drawn + 3:
            next(chunks)
    assert endless.has_stopped()
