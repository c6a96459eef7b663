"""What OpenAI's own client gets from the stateful routes, over a real socket: responses, conversations, what is between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from corral.serving.admission import Admission
from corral.serving.database import Database
from corral.serving.keys import KeyStore
from tests.serving.conftest import Serve, bearer, openai_client, wait_for
from tests.serving.postgres import PostgreSQL
from tests.serving.stateful import ASK, echo_engine, echoed, list_items, serve_in_process


@pytest.fixture
def client(serve: Serve, database_url: str) -> openai.OpenAI:
    return serve.with_store(echo_engine(serve.template), database_url).client


def test_a_response_repeats_its_settings_and_can_be_retrieved_and_deleted(client: openai.OpenAI) -> None:
    response = client.responses.create(
        **ASK, input="Hello", instructions="Be kind.", temperature=0.5, top_p=0.9, metadata={"a": "b"}
    )
    assert response.output_text == f"system\nBe kind.\n{echoed('Hello')}"
    assert (response.object, response.status, response.model, response.error) == ("response", "completed", "m", None)
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 400)
    assert (response.instructions, response.metadata) == ("Be kind.", {"a": "b"})
    assert response.usage
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens > 0
    assert response.output[0].type == "message"
    assert (response.output[0].role, response.output[0].status) == ("assistant", "completed")
    assert response.completed_at
    assert response.completed_at >= response.created_at
    assert client.responses.retrieve(response.id) == response
    inputs = client.responses.input_items.list(response.id).data
    assert [(item.type, item.role, item.content[0].text) for item in inputs] == [("message", "user", "Hello")]  # type: ignore[union-attr]
    client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


def test_turns_of_a_conversation_include_its_earlier_messages(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(metadata={"title": "Sums"})
    first = client.responses.create(**ASK, input="What is 2 + 2?", conversation=conversation.id)
    *_, done = client.responses.create(**ASK, input="And 3?", conversation={"id": conversation.id}, stream=True)
    assert done.type == "response.completed"
    assert done.response.conversation
    assert done.response.conversation.id == conversation.id
    assert done.response.output_text == echoed("What is 2 + 2?", first.output_text, "And 3?")
    assert list_items(client, conversation.id) == [
        ("user", "completed", "What is 2 + 2?"),
        ("assistant", "completed", first.output_text),
        ("user", "completed", "And 3?"),
        ("assistant", "completed", done.response.output_text),
    ]


def test_turns_by_previous_response_include_it_and_may_branch(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK, input="One", instructions="Be kind.")
    second = client.responses.create(**ASK, input="Two", previous_response_id=first.id)
    other = client.responses.create(**ASK, input="Other", previous_response_id=first.id)
    assert second.output_text == echoed("One", first.output_text, "Two"), "instructions are not carried over"
    assert other.output_text == echoed("One", first.output_text, "Other")
    assert second.previous_response_id == first.id
    inputs = client.responses.input_items.list(second.id).data
    assert [item.content[0].text for item in inputs] == ["Two"]  # type: ignore[union-attr]
    third = client.responses.create(**ASK, input="Three", previous_response_id=second.id)
    assert third.output_text == echoed("One", first.output_text, "Two", second.output_text, "Three")


def test_messages_of_every_form_are_accepted_including_a_returned_answer(client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK, input="One", store=False)
    history: Any = [
        {"role": "developer", "content": "Be kind."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "O"}, {"type": "input_text", "text": "ne"}],
        },
        *[item.model_dump() for item in first.output],
        {"role": "user", "content": "Two"},
    ]
    second = client.responses.create(**ASK, input=history)
    assert second.output_text == "system\nBe kind.\n" + echoed("One", first.output_text, "Two")


def test_a_conversation_that_ends_with_the_user_needs_no_input(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(items=[{"role": "user", "content": "Hello"}])
    assert client.responses.create(**ASK, conversation=conversation.id).output_text == echoed("Hello")


def test_store_false_keeps_no_response_and_continues_the_conversation(client: openai.OpenAI) -> None:
    alone = client.responses.create(**ASK, input="Secret", store=False)
    conversation = client.conversations.create()
    inside = client.responses.create(**ASK, input="Said", store=False, conversation=conversation.id)
    for response in (alone, inside):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(response.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(**ASK, input="on", previous_response_id=response.id)
    assert [text for _, _, text in list_items(client, conversation.id)] == ["Said", inside.output_text]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": [{"type": "web_search"}]}, "tools"),
    "a form of text": ({"text": {"format": {"type": "json_object"}}}, "text"),
    "in the background": ({"background": True}, "background"),
    "a tool that must be called": ({"tool_choice": "required"}, "tool_choice"),
    "too many log-probabilities": ({"top_logprobs": 21}, "top_logprobs"),
    "a stored prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "several answers": ({"n": 2}, "n"),
    "no number": ({"max_output_tokens": 0}, "max_output_tokens"),
    "too much metadata": ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
    "a picture": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
    ),
    "a tool's output": ({"input": [{"type": "function_call_output", "call_id": "c", "output": ""}]}, "input[0]"),
    "nothing said": ({"input": []}, "input"),
    "two pasts": ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "previous_response_id"),
}


def test_unsupported_parameters_are_refused_by_name(client: openai.OpenAI) -> None:
    for case, (changes, param) in REFUSED.items():
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.create(**ASK, **({"input": "Hi"} if "input" not in changes else {}), extra_body=changes)
        assert str(caught.value.param).startswith(param), case


def test_parameters_without_effect_are_accepted_and_those_without_a_neutral_value_reported(
    client: openai.OpenAI,
) -> None:
    neutral: Any = {"tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}}, "top_logprobs": 0}
    neutral |= {
        "include": [],
        "background": False,
        "truncation": "disabled",
        "n": 1,
        "min_p": 0,
        "repetition_penalty": 1,
    }
    neutral |= {"parallel_tool_calls": None, "reasoning": None, "prompt": None, "stop": []}
    answer = client.responses.with_raw_response.create(**ASK, input="Hi", extra_body=neutral)
    assert answer.parse().output_text == echoed("Hi")
    assert "x-corral-ignored" not in answer.headers
    reported: Any = {"service_tier": "auto", "reasoning": {"effort": "high"}, "prompt_cache_key": "k", "frobnicate": 1}
    reported |= {"text": {"verbosity": "low"}, "user": "me", "safety_identifier": "s"}
    more: Any = {"include": ["reasoning.encrypted_content"], "metadata": {"a": "b"}}
    answer = client.responses.with_raw_response.create(**ASK, input="Hi", extra_body={**reported, **more})
    assert answer.parse().output_text == echoed("Hi")
    names = set(answer.headers["x-corral-ignored"].split(", "))
    assert names == {*reported, "verbosity"} - {"text"}


def test_system_messages_may_be_several_or_late_or_alone(client: openai.OpenAI) -> None:
    mixed: Any = [{"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    mixed += [{"role": "developer", "content": "d"}, {"role": "user", "content": "e"}]
    answer = client.responses.create(**ASK, instructions="a", input=mixed)
    assert answer.output_text == "system\na\nsystem\nb\nuser\nc\nsystem\nd\nuser\ne\nassistant\n"
    assert "a\n" in client.responses.create(**ASK, instructions="a").output_text


def test_an_answer_that_the_client_began_is_continued(client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    begun: Any = [{"role": "user", "content": "Count"}, {"role": "assistant", "content": "One,"}]
    answer = client.responses.create(**ASK, input=begun, conversation=conversation.id)
    assert answer.output_text == "user\nCount\nassistant\nOne,"
    with pytest.raises(openai.BadRequestError, match="nothing to answer"):
        client.responses.create(**ASK, conversation=conversation.id)


def test_reasoning_and_fields_of_items_that_clients_send_back_change_nothing(client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "user", "content": "One", "name": "ann"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "final_answer"}
        | {"content": [{"type": "output_text", "text": "1", "annotations": [], "logprobs": [{"token": "1"}]}]},
        {"role": "user", "content": [{"type": "input_text", "text": "Two", "cache_control": {"type": "ephemeral"}}]},
    ]
    assert client.responses.create(**ASK, input=items).output_text == echoed("One", "1", "Two")


def test_more_tokens_than_there_is_room_for_are_reduced_and_said(client: openai.OpenAI) -> None:
    answer = client.responses.with_raw_response.create(model="m", input="Hi", max_output_tokens=10**6)
    assert answer.parse().output_text == echoed("Hi")
    assert 1000 < int(answer.headers["x-corral-max-tokens"]) <= 8192


def test_log_probabilities_come_with_a_response_and_with_the_text_of_a_stream(client: openai.OpenAI) -> None:
    wish: Any = {**ASK, "input": "Hi", "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = client.responses.create(**wish)
    (part,) = response.output[0].content  # type: ignore[union-attr]
    assert part.type == "output_text"
    assert part.logprobs
    assert b"".join(bytes(token.bytes or []) for token in part.logprobs).decode() == response.output_text
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in part.logprobs)
    deltas = [event for event in client.responses.create(**wish, stream=True) if event.type.endswith("text.delta")]
    streamed = [token.logprob for event in deltas for token in event.logprobs]  # type: ignore[union-attr]
    assert streamed == [token.logprob for token in part.logprobs]
    stored = client.responses.retrieve(response.id).output[0]
    assert stored.content[0].logprobs == [], "they are not stored"  # type: ignore[union-attr]


def test_a_refused_request_leaves_its_conversation_unlocked_and_unchanged(client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    for _ in range(2):
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**ASK, input=[], conversation=conversation.id)
    assert list_items(client, conversation.id) == []
    assert client.responses.create(**ASK, input="Hi", conversation=conversation.id).status == "completed"


def test_unknown_models_conversations_and_previous_responses_are_404(client: openai.OpenAI) -> None:
    for changes, param in (
        ({"model": "other"}, "model"),
        ({"conversation": "conv_" + "0" * 32}, "conversation"),
        ({"conversation": "../etc"}, "conversation"),
        ({"previous_response_id": "resp_" + "0" * 32}, "previous_response_id"),
        ({"previous_response_id": "\0"}, "previous_response_id"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(**({**ASK, "input": "Hi"} | changes))
        assert caught.value.param == param


def test_conversations_are_created_renamed_listed_exported_and_deleted(client: openai.OpenAI) -> None:
    conversation = client.conversations.create(
        metadata={"title": "Old"}, items=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    )
    assert (conversation.object, conversation.metadata) == ("conversation", {"title": "Old"})
    renamed = client.conversations.update(conversation.id, metadata={"title": "New"})
    assert renamed == client.conversations.retrieve(conversation.id)
    assert renamed.metadata == {"title": "New"}
    other = client.conversations.create()
    listed: Any = client.get("/conversations", cast_to=object, options={"params": {"limit": 1}})
    assert ([each["id"] for each in listed["data"]], listed["has_more"]) == ([other.id], True)
    listed = client.get("/conversations", cast_to=object, options={"params": {"after": listed["last_id"]}})
    assert ([each["metadata"] for each in listed["data"]], listed["has_more"]) == ([{"title": "New"}], False)
    export: Any = client.get(f"/conversations/{conversation.id}/export", cast_to=object)
    assert export["metadata"] == {"title": "New"}
    assert export["messages"] == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert [item["content"][0]["type"] for item in export["items"]] == ["input_text", "output_text"]
    deleted = client.conversations.delete(conversation.id)
    assert (deleted.deleted, deleted.object) == (True, "conversation.deleted")
    with pytest.raises(openai.NotFoundError):
        client.conversations.retrieve(conversation.id)


def test_a_long_conversation_is_exported_whole_page_by_page(client: openai.OpenAI) -> None:
    texts = ["é\0漢" * 5_000 + str(i) for i in range(12)]
    conversation = client.conversations.create(items=[{"role": "user", "content": text} for text in texts[:6]])
    client.conversations.items.create(
        conversation.id, items=[{"role": "developer", "content": text} for text in texts[6:]]
    )
    export: Any = client.get(f"/conversations/{conversation.id}/export", cast_to=object)
    assert [item["content"][0]["text"] for item in export["items"]] == texts
    assert [message["content"] for message in export["messages"]] == texts
    assert [message["role"] for message in export["messages"]] == ["user"] * 6 + ["system"] * 6
    empty = client.conversations.create(metadata={"title": "none"})
    export = client.get(f"/conversations/{empty.id}/export", cast_to=object)
    assert (export["items"], export["messages"], export["metadata"]) == ([], [], {"title": "none"})


def test_few_exports_of_one_key_run_at_once_and_others_are_told_to_try_again(database: Database, serve: Serve) -> None:
    keys = KeyStore(database)
    secret, other = (keys.add(name)[1] for name in ("ann", "bob"))
    server = serve.with_store(echo_engine(serve.template), database, Admission(keys=keys))
    with openai_client(server.url, api_key=secret) as client:
        conversation = client.conversations.create()
        for _ in range(4):
            client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x" * 1_000_000}])
    path = f"/v1/conversations/{conversation.id}/export"
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            head = f"GET {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {secret}\r\n\r\n"
            slow = stack.enter_context(server.connect(head, receive_buffer=4096))
            assert slow.recv(12) == b"HTTP/1.1 200"
        status, body, headers = server.call("GET", path, headers=bearer(secret))
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "server_full", "1")
        assert server.call("GET", path, headers=bearer(other))[0] == 404, "who reads slowly stops nobody else"
    assert wait_for(lambda: server.call("GET", path, headers=bearer(secret))[0] == 200)


def test_items_are_added_paged_read_and_deleted(client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    added = client.conversations.items.create(
        conversation.id, items=[{"role": "user", "content": str(i)} for i in range(5)]
    )
    assert (added.first_id, added.last_id, added.has_more) == (added.data[0].id, added.data[-1].id, False)
    paged = list(client.conversations.items.list(conversation.id, limit=2))  # the client asks for page after page
    assert [item.id for item in paged] == [item.id for item in added.data][::-1]
    one = client.conversations.items.retrieve(str(added.data[1].id), conversation_id=conversation.id)
    assert one == added.data[1]
    assert client.conversations.items.delete(str(one.id), conversation_id=conversation.id).id == conversation.id
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve(str(one.id), conversation_id=conversation.id)
    assert [text for _, _, text in list_items(client, conversation.id)] == ["0", "2", "3", "4"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.conversations.items.create(conversation.id, items=[{"role": "user", "content": "x"}] * 21)
    assert caught.value.param == "items"


def test_the_parts_of_a_message_are_bounded(client: openai.OpenAI) -> None:
    part: Any = {"type": "input_text", "text": ""}
    conversation = client.conversations.create(items=[{"role": "user", "content": [part] * 1024}])
    (item,) = client.conversations.items.list(conversation.id).data
    assert len(item.content) == 1024  # type: ignore[union-attr]
    with pytest.raises(openai.BadRequestError) as caught:
        client.conversations.items.create(conversation.id, items=[{"role": "user", "content": [part] * 1025}])
    assert caught.value.param == "items[0].content"


def test_query_parameters_are_validated_and_those_without_effect_ignored(client: openai.OpenAI) -> None:
    conversation = client.conversations.create()
    response = client.responses.create(**ASK, input="Hi")
    path = f"/conversations/{conversation.id}"
    for address, param in (
        (f"{path}/items?limit=0", "limit"),
        (f"{path}/items?limit=101", "limit"),
        (f"{path}/items?order=up", "order"),
        (f"{path}/items?after=msg_none", "after"),
        (f"/responses/{response.id}?stream=true", "stream"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.get(address, cast_to=object)
        assert caught.value.param == param
    for address in (
        f"{path}/items?include[]=x",
        f"{path}?verbose=1",
        f"/responses/{response.id}?include[]=x&stream=false",
    ):
        assert client.get(address, cast_to=object)


async def test_the_async_client_and_many_conversations_at_once(client: openai.OpenAI) -> None:
    async with openai.AsyncOpenAI(base_url=str(client.base_url), api_key="none", max_retries=0) as asynchronous:

        async def talk(who: int) -> list[str]:
            conversation = await asynchronous.conversations.create()
            answers: list[str] = []
            for turn in range(2):
                stream = await asynchronous.responses.create(
                    **ASK, input=f"{who}, {turn}", conversation=conversation.id, stream=True
                )
                async for event in stream:
                    if event.type == "response.completed":
                        answers.append(event.response.output_text)
            return answers

        for who, (first, second) in enumerate(await asyncio.gather(*(talk(who) for who in range(8)))):
            assert first == echoed(f"{who}, 0")
            assert second == echoed(f"{who}, 0", first, f"{who}, 1")


def test_each_key_sees_only_its_own_conversations_and_others_are_404(database: Database, serve: Serve) -> None:
    keys = KeyStore(database)
    secrets = [keys.add(name)[1] for name in ("ann", "bob")]
    url = serve.with_store(echo_engine(serve.template), database, Admission(keys=keys)).url
    ann, bob = (openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) for secret in secrets)
    conversation = ann.conversations.create(items=[{"role": "user", "content": "secret"}])
    item = ann.conversations.items.list(conversation.id).data[0].id
    response = ann.responses.create(**ASK, conversation=conversation.id)
    calls: list[Callable[[str, str, str], object]] = [
        lambda c, r, i: bob.conversations.retrieve(c),
        lambda c, r, i: bob.conversations.update(c, metadata={}),
        lambda c, r, i: bob.conversations.delete(c),
        lambda c, r, i: bob.get(f"/conversations/{c}/export", cast_to=object),
        lambda c, r, i: bob.conversations.items.list(c),
        lambda c, r, i: bob.conversations.items.create(c, items=[{"role": "user", "content": "x"}]),
        lambda c, r, i: bob.conversations.items.retrieve(i, conversation_id=c),
        lambda c, r, i: bob.conversations.items.delete(i, conversation_id=c),
        lambda c, r, i: bob.responses.create(**ASK, input="x", conversation=c),
        lambda c, r, i: bob.responses.create(**ASK, input="x", previous_response_id=r),
        lambda c, r, i: bob.responses.retrieve(r),
        lambda c, r, i: bob.responses.delete(r),
        lambda c, r, i: bob.responses.input_items.list(r),
    ]
    for call in calls:
        words: list[str] = []
        for ids in (
            (conversation.id, response.id, str(item)),
            tuple(f"{k}_{0:032x}" for k in ("conv", "resp", "msg")),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                call(*ids)  # type: ignore[call-arg]
            text = str(caught.value.body)
            for id_ in ids:
                text = text.replace(id_, "ID")
            words.append(text)
        assert words[0] == words[1], "nothing tells that it is somebody else's"
    assert bob.get("/conversations", cast_to=object)["data"] == []  # type: ignore[index]
    assert ann.conversations.items.list(conversation.id).data[-1].id == item
    assert ann.responses.retrieve(response.id) == response
    for client in (ann, bob):
        client.close()


def test_a_server_killed_during_a_stream_loses_nothing_it_acknowledged(
    database_url: str, tiny_folder: Path, serve: Serve
) -> None:
    with serve_in_process(tiny_folder, database_url, delay=0.02, lease=1) as (url, child), openai_client(url) as client:
        conversation = client.conversations.create(metadata={"title": "kept"})
        first = client.responses.create(**ASK, input="First", conversation=conversation.id)
        stream = iter(client.responses.create(**ASK, input="Second", conversation=conversation.id, stream=True))
        created = next(stream)
        assert created.type == "response.created"
        while next(stream).type != "response.output_text.delta":
            pass
        child.kill()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    client = serve.with_store(echo_engine(serve.template), database_url, lease_seconds=1).client
    assert client.conversations.retrieve(conversation.id) == conversation
    assert client.responses.retrieve(first.id) == first
    before = [("user", "completed", "First"), ("assistant", "completed", first.output_text)]
    assert list_items(client, conversation.id) == before, "no half an answer, and no question without one"
    # The client tries again by itself while the dead process still holds the conversation.
    patient = client.with_options(max_retries=6)
    third = patient.responses.create(**ASK, input="Third", conversation=conversation.id)
    assert third.output_text == echoed("First", first.output_text, "Third")
    dead = client.responses.retrieve(created.response.id)
    assert (dead.status, dead.output) == ("failed", [])
    assert dead.error


@pytest.mark.full
def test_two_servers_share_conversations_in_postgresql(postgres: PostgreSQL, tiny_folder: Path, serve: Serve) -> None:
    url = postgres.new_database()
    with (
        serve_in_process(tiny_folder, url, delay=0.02, lease=2) as (left_url, left),
        serve_in_process(tiny_folder, url, delay=0.02, lease=2) as (right_url, _),
        openai_client(left_url) as one,
        openai_client(right_url) as other,
    ):
        conversation = one.conversations.create(metadata={"title": "shared \0"})
        first = one.responses.create(**ASK, input="First", conversation=conversation.id)
        second = other.responses.create(**ASK, input="Second", conversation=conversation.id)
        assert second.output_text == echoed("First", first.output_text, "Second")
        assert one.conversations.retrieve(conversation.id).metadata == {"title": "shared \0"}
        chained = other.responses.create(**ASK, input="Aside", previous_response_id=first.id)
        assert chained.output_text == echoed("First", first.output_text, "Aside")
        before = list_items(one, conversation.id)
        assert list_items(other, conversation.id) == before
        stream = iter(one.responses.create(**ASK, input="Third", conversation=conversation.id, stream=True))
        next(stream)
        with pytest.raises(openai.ConflictError):
            other.responses.create(**ASK, input="Third too", conversation=conversation.id)
        left.kill()
        with pytest.raises(openai.APIConnectionError):
            list(stream)
        patient = other.with_options(max_retries=6)
        last = patient.responses.create(**ASK, input="Fourth", conversation=conversation.id)
        assert "Third" not in last.output_text
        assert list_items(other, conversation.id)[: len(before)] == before
        postgres.stop()
        with pytest.raises(openai.InternalServerError) as caught:
            other.conversations.retrieve(conversation.id)
        assert (caught.value.status_code, caught.value.code) == (503, "database_unavailable")
        postgres.start()
        assert other.conversations.retrieve(conversation.id).id == conversation.id
