"""`/v1/embeddings` as OpenAI's client meets it."""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Generator, Sequence
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from numpy.typing import NDArray

from corral.engines.embedding import Embedder
from corral.serving.admission import Admission
from corral.serving.embeddings import build_router
from corral.serving.models import ServedModel, ServedModels
from tests.serving.conftest import Serve, openai_client, serve_in_thread, wait_for

TEXTS = ["Boil the eggs for six minutes.", "Eggs are cooked in hot water.", "The court refused the appeal."]
MODEL = "all-minilm-l6-v2"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture(scope="module")
def embedding(tiny_served: ServedModel, embedder: Embedder) -> Generator[openai.OpenAI]:
    models, admission = ServedModels([tiny_served], embedder), Admission()
    with (
        serve_in_thread(models, admission=admission, routers=[build_router(models, admission)]) as url,
        openai_client(url) as client,
    ):
        yield client


def test_vectors_are_the_embedders_in_the_order_of_the_texts(embedding: openai.OpenAI, embedder: Embedder) -> None:
    expected = embedder(TEXTS)
    for form in ("float", "base64", None):  # the client asks for base64 by itself, and reads it
        options: Any = {} if form is None else {"encoding_format": form}
        answer = embedding.embeddings.create(model=MODEL, input=TEXTS, **options)
        assert [each.index for each in answer.data] == [0, 1, 2]
        given: list[Any] = [each.embedding for each in answer.data]
        if form == "base64":
            given = [np.frombuffer(base64.b64decode(each), "<f4") for each in given]
        np.testing.assert_allclose(np.array(given), expected, atol=1e-6)
    (near, far) = (expected[0] @ other for other in expected[1:])
    assert near > far + 0.2


def test_a_single_text_is_accepted_and_usage_counts_its_tokens(embedding: openai.OpenAI, embedder: Embedder) -> None:
    answer = embedding.embeddings.create(model=MODEL, input=TEXTS[0], dimensions=384, user="me")
    assert len(answer.data) == 1
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == len(embedder.tokenize(TEXTS[:1])[0]) + 2 > 5
    assert (answer.model, answer.object) == (MODEL, "list")


def test_token_ids_are_the_same_texts(embedding: openai.OpenAI, embedder: Embedder) -> None:
    several = embedder.tokenize(TEXTS)
    answer = embedding.embeddings.create(model=MODEL, input=several, encoding_format="float")
    np.testing.assert_allclose(np.array([each.embedding for each in answer.data]), embedder(TEXTS), atol=1e-6)
    answer = embedding.embeddings.create(model=MODEL, input=several[0], encoding_format="float")
    np.testing.assert_allclose(np.array(answer.data[0].embedding), embedder(TEXTS[:1])[0], atol=1e-6)


def test_a_long_text_is_the_mean_of_its_windows_weighted_by_their_tokens(
    embedding: openai.OpenAI, embedder: Embedder
) -> None:
    text = "Boil the eggs for six minutes. " * 50
    (ids,) = embedder.tokenize([text])
    windows = [ids[:254], ids[254:]]
    assert 0 < len(windows[1]) < 254
    mean = sum(len(each) * vector for each, vector in zip(windows, embedder.embed_ids(windows), strict=True))
    answer = embedding.embeddings.create(model=MODEL, input=[TEXTS[0], text], encoding_format="float")
    np.testing.assert_allclose(np.array(answer.data[1].embedding), mean / np.linalg.norm(mean), atol=1e-6)
    assert answer.usage.prompt_tokens == len(embedder.tokenize(TEXTS[:1])[0]) + len(ids) + 3 * 2


def test_fewer_dimensions_are_the_first_ones_with_length_1(embedding: openai.OpenAI, embedder: Embedder) -> None:
    answer = embedding.embeddings.create(model=MODEL, input=TEXTS, dimensions=100, encoding_format="float")
    first = embedder(TEXTS)[:, :100]
    expected = first / np.linalg.norm(first, axis=1, keepdims=True)
    np.testing.assert_allclose(np.array([each.embedding for each in answer.data]), expected, atol=1e-6)


def test_fields_that_embeddings_do_not_know_are_named_in_a_header(embedding: openai.OpenAI) -> None:
    extra = {"input_type": "query", "truncate": "END"}
    response = embedding.embeddings.with_raw_response.create(model=MODEL, input="Two", extra_body=extra)
    assert response.headers["x-corral-ignored"] == "input_type, truncate"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input": ["fine", ""]}, "input[1]"),
        ({"input": ""}, "input[0]"),
        ({"input": [[5], []]}, "input"),
        ({"input": [[30_522]]}, "input[0]"),
        ({"input": [[-1]]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": ["a"] * 1025}, "input"),
        ({"input": ["a " * 130_050] * 2}, "input"),
        ({"dimensions": 385}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_unsupported_embedding_parameters_are_refused_by_name(
    changes: Any, param: str, embedding: openai.OpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        embedding.embeddings.create(**({"model": MODEL, "input": TEXTS} | changes))
    assert caught.value.param == param


def test_chat_models_do_not_embed_and_embedding_models_do_not_chat(embedding: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        embedding.embeddings.create(model="tiny", input=TEXTS)
    with pytest.raises(openai.NotFoundError):
        embedding.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])


def test_the_embedding_model_is_listed_and_without_one_the_route_is_404(
    embedding: openai.OpenAI, client: openai.OpenAI
) -> None:
    listed = {model.id: (model.model_extra or {})["task"] for model in embedding.models.list()}
    assert listed == {"tiny": "chat", MODEL: "embeddings"}
    assert embedding.models.retrieve(MODEL).id == MODEL
    assert embedding.models.retrieve("tiny").owned_by == "corral"
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input=TEXTS)


class Slow(Embedder):
    """Computes nothing until it is let, and counts what is computed at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.running = self.most = 0

    @contextlib.contextmanager
    def _counted(self) -> Generator[None]:
        self.running += 1
        self.most = max(self.most, self.running)
        yield
        self.running -= 1

    def embed_ids(self, windows: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        with self._counted():
            assert self.gate.wait(60)
            return np.ones((len(windows), 384))

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        with self._counted():
            return [[1]] * len(texts)


def test_cancelled_embeddings_are_not_started_and_one_runs_at_a_time(serve: Serve) -> None:
    slow, admission = Slow(), Admission()
    models = ServedModels([serve.model("Hello")], slow)
    server = serve(models, admission, routers=[build_router(models, admission)])
    body = {"model": MODEL, "input": "Hi"}
    for _ in range(5):
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{server.url}/v1/embeddings", json=body, timeout=0.3)
        assert wait_for(lambda: admission.queue.running == 0)
    assert slow.most == 1, "the thread ends what it computes, and begins nothing beside it"
    slow.gate.set()
    assert server.call("POST", "/v1/embeddings", body)[0] == 200
    assert slow.most == 1
