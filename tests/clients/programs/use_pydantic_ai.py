"""pydantic-ai's agents with plain text as their output, over the chat and the Responses protocol."""

import asyncio

from pydantic_ai import Agent, Embedder
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIChatModelSettings, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from scenarios import ANSWER, EMBEDDING_MODEL, MODEL, main, scenario


def provider(url):
    return OpenAIProvider(base_url=url, api_key="none")


def agent(url, **options):
    return Agent(OpenAIChatModel(MODEL, provider=provider(url)), **options)


def check(text):
    assert text == ANSWER, text


@scenario
def plain(url):
    check(agent(url).run_sync("What is two plus two?").output)


@scenario
def instructions_and_several_system_prompts(url):
    check(agent(url, instructions="Be brief.", system_prompt=["Answer.", "In English."]).run_sync("Two?").output)


@scenario
def history(url):
    talker = agent(url, system_prompt="Be brief.")
    first = talker.run_sync("Two?")
    check(talker.run_sync("Three?", message_history=first.all_messages()).output)


@scenario
def settings(url):
    chosen = OpenAIChatModelSettings(
        temperature=0.5, max_tokens=64, top_p=0.9, seed=7, presence_penalty=0.1, frequency_penalty=0.1,
        logit_bias={"5": -1}, stop_sequences=["###"], parallel_tool_calls=False, openai_logprobs=True,
        openai_top_logprobs=2, openai_user="ann", extra_body={"top_k": 20, "min_p": 0.1},
    )  # fmt: skip
    check(agent(url, model_settings=chosen).run_sync("Two?").output)


@scenario
def effort(url):
    chosen = OpenAIChatModelSettings(openai_reasoning_effort="low")
    check(agent(url, model_settings=chosen).run_sync("Two?").output)


@scenario
def streamed(url):
    async def work():
        async with agent(url).run_stream("What is two plus two?") as result:
            texts = [text async for text in result.stream_text(delta=True, debounce_by=None)]
        check("".join(texts))

    asyncio.run(work())


@scenario
def responses_protocol(url):
    talker = Agent(OpenAIResponsesModel(MODEL, provider=provider(url)), instructions="Be brief.")
    first = talker.run_sync("What is two plus two?")
    check(first.output)
    check(talker.run_sync("Three?", message_history=first.all_messages()).output)

    async def work():
        async with talker.run_stream("Two?") as result:
            check(await result.get_output())

    asyncio.run(work())


@scenario
def embeddings(url):
    embedder = Embedder(OpenAIEmbeddingModel(EMBEDDING_MODEL, provider=provider(url)))
    assert len(embedder.embed_sync(["Two plus two is four.", "Grüße"], input_type="document").embeddings) == 2


if __name__ == "__main__":
    main()
