"""OpenAI's own client: plain and streamed, its stream helpers, raw responses, embeddings, responses, conversations."""

import asyncio

import openai
from scenarios import ANSWER, ASK, EMBEDDING_MODEL, LATER_SYSTEM, MODEL, PREFILL, SYSTEM, main, scenario


def connect(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def check(text):
    assert text == ANSWER, text


def chat(url, messages=ASK, **options):
    answer = connect(url).chat.completions.create(model=MODEL, messages=messages, **options)
    for choice in answer.choices:
        check(choice.message.content)
    return answer


def joined(chunks):
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


@scenario
def plain(url):
    assert chat(url).choices[0].finish_reason == "stop"


@scenario
def with_every_neutral_setting(url):
    chat(
        url, SYSTEM, frequency_penalty=0, presence_penalty=0, logit_bias={}, n=1, temperature=1, top_p=1, stop=None,
        seed=7, user="ann", store=False, metadata={"for": "test"}, parallel_tool_calls=True, service_tier="auto",
        response_format={"type": "text"}, modalities=["text"], max_completion_tokens=64, tools=[], tool_choice="none",
        safety_identifier="ann", prompt_cache_key="p",
    )  # fmt: skip


@scenario
def with_penalties_and_bias(url):
    chat(url, frequency_penalty=0.5, presence_penalty=-0.5, logit_bias={"5": -100, "6": 1})


@scenario
def with_effort_and_verbosity_as_reasoning_models_take(url):
    chat(url, reasoning_effort="low", verbosity="low", store=True)


@scenario
def streamed_with_usage(url):
    chunks = [*connect(url).chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )]  # fmt: skip
    check(joined(chunks))
    assert chunks[-1].usage.completion_tokens > 0


@scenario
def stream_helper(url):
    with connect(url).chat.completions.stream(model=MODEL, messages=ASK) as stream:
        kinds = [event.type for event in stream]
        check(stream.get_final_completion().choices[0].message.content)
    assert {"chunk", "content.delta", "content.done"} <= set(kinds), kinds


@scenario
def stream_helper_with_logprobs(url):
    with connect(url).chat.completions.stream(model=MODEL, messages=ASK, logprobs=True, top_logprobs=2) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert "logprobs.content.done" in kinds, kinds
    assert len(final.logprobs.content[0].top_logprobs) == 2


@scenario
def parse_without_a_schema(url):
    check(connect(url).chat.completions.parse(model=MODEL, messages=ASK).choices[0].message.content)


@scenario
def raw_response(url):
    raw = connect(url).chat.completions.with_raw_response.create(model=MODEL, messages=ASK)
    assert raw.headers["x-request-id"]
    check(raw.parse().choices[0].message.content)


@scenario
def streaming_response(url):
    with connect(url).chat.completions.with_streaming_response.create(model=MODEL, messages=ASK) as response:
        assert ANSWER in "".join(response.iter_text())


@scenario
def several_choices(url):
    assert len(chat(url, n=3, temperature=0.8).choices) == 3


@scenario
def several_choices_streamed(url):
    chunks = [*connect(url).chat.completions.create(model=MODEL, messages=ASK, n=2, stream=True)]
    for index in range(2):
        check("".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index))


@scenario
def logprobs(url):
    content = chat(url, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(each.token for each in content) == ANSWER
    assert len(content[0].top_logprobs) == 3


@scenario
def stop_list(url):
    answer = connect(url).chat.completions.create(
        model=MODEL, messages=ASK, stop=[" is", "\n\n", "###", "User:", "END"]
    )
    assert answer.choices[0].message.content == "Two plus two"


@scenario
def later_system_message(url):
    chat(url, LATER_SYSTEM)


@scenario
def developer_message(url):
    chat(url, [{"role": "developer", "content": "Be brief."}, *ASK])


@scenario
def prefill(url):
    chat(url, PREFILL)


@scenario
def parts_and_name(url):
    chat(
        url,
        [
            {
                "role": "user",
                "name": "ann",
                "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": " 2?"}],
            }
        ],
    )


@scenario
def answer_sent_back(url):
    first = chat(url).choices[0].message
    chat(url, [*ASK, first, {"role": "user", "content": "And three plus three?"}])
    chat(url, [*ASK, first.model_dump(), {"role": "user", "content": "And three plus three?"}])


@scenario
def extra_body(url):
    chat(url, extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "stop_token_ids": [5]}, max_tokens=32)
    chat(url, extra_body={"top_k": -1, "chat_template_kwargs": {"enable_thinking": False}})


@scenario
def limit_beyond_the_context(url):
    chat(url, max_tokens=100_000)


@scenario
def asynchronous(url):
    async def work():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            create = client.chat.completions.create
            answers = await asyncio.gather(*(create(model=MODEL, messages=ASK) for _ in range(4)))
            chunks = [chunk async for chunk in await create(model=MODEL, messages=ASK, stream=True)]
        for answer in answers:
            check(answer.choices[0].message.content)
        check(joined(chunks))

    asyncio.run(work())


@scenario
def errors(url):
    def error(kind, **body):
        try:
            connect(url).chat.completions.create(**{"model": MODEL, "messages": ASK, **body})
        except kind as raised:
            return raised
        raise AssertionError("no error")

    assert error(openai.NotFoundError, model="absent").code == "model_not_found"
    assert error(openai.BadRequestError, response_format={"type": "json_object"}).param == "response_format"


@scenario
def completions(url):
    client = connect(url)
    answer = client.completions.create(model=MODEL, prompt="Two plus two is", max_tokens=32, logprobs=2, best_of=1)
    check(answer.choices[0].text)
    assert len(client.completions.create(model=MODEL, prompt=["a", "b"], echo=True, max_tokens=1).choices) == 2
    client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=4, suffix=None)
    chunks = client.completions.create(model=MODEL, prompt="Two", stream=True, stream_options={"include_usage": True})
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices)


@scenario
def embeddings(url):
    client = connect(url)
    assert len(client.embeddings.create(model=EMBEDDING_MODEL, input="Two").data[0].embedding) == 384
    assert len(client.embeddings.create(model=EMBEDDING_MODEL, input=["Two", "Grüße, 東京 🙂"]).data) == 2
    assert len(client.embeddings.create(model=EMBEDDING_MODEL, input=[[2048], [2048, 4606]]).data) == 2
    assert len(client.embeddings.create(model=EMBEDDING_MODEL, input="Two", dimensions=64).data[0].embedding) == 64


@scenario
def models(url):
    client = connect(url)
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


@scenario
def responses(url):
    client = connect(url)
    first = client.responses.create(model=MODEL, input="What is two plus two?", instructions="Be brief.")
    check(first.output_text)
    check(client.responses.create(model=MODEL, input="Again", previous_response_id=first.id).output_text)
    check(client.responses.create(model=MODEL, input=[*LATER_SYSTEM], store=False).output_text)
    check(client.responses.create(model=MODEL, input=[*ASK, *first.output, *ASK]).output_text)
    check(client.responses.parse(model=MODEL, input="Again").output_text)
    assert client.responses.retrieve(first.id).id == first.id
    assert client.responses.input_items.list(first.id).data
    client.responses.delete(first.id)


@scenario
def responses_with_neutral_settings(url):
    answer = connect(url).responses.create(
        model=MODEL, input=ASK, temperature=1, top_p=1, truncation="disabled", text={"format": {"type": "text"}},
        reasoning={"effort": "low", "summary": "auto"}, include=["reasoning.encrypted_content"], tools=[],
        tool_choice="auto", parallel_tool_calls=True, metadata={"a": "b"}, max_output_tokens=64, user="ann",
        service_tier="auto", background=False, store=True,
    )  # fmt: skip
    check(answer.output_text)


@scenario
def responses_with_verbosity(url):
    check(connect(url).responses.create(model=MODEL, input="Two?", text={"verbosity": "low"}).output_text)


@scenario
def responses_streamed(url):
    client = connect(url)
    events = [*client.responses.create(model=MODEL, input="What is two plus two?", stream=True)]
    check("".join(event.delta for event in events if event.type == "response.output_text.delta"))
    with client.responses.stream(model=MODEL, input="What is two plus two?") as stream:
        for _ in stream:
            pass
        check(stream.get_final_response().output_text)


@scenario
def conversations(url):
    client = connect(url)
    conversation = client.conversations.create(metadata={"title": "Sums"}, items=[{"type": "message", **ASK[0]}])
    check(client.responses.create(model=MODEL, conversation=conversation.id).output_text)
    items = client.conversations.items.list(conversation.id)
    assert len(items.data) == 2
    client.conversations.update(conversation.id, metadata={"title": "Two"})
    assert client.conversations.delete(conversation.id).deleted


if __name__ == "__main__":
    main()
