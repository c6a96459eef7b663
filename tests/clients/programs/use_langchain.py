"""LangChain's models for OpenAI: chat, completions, the Responses protocol and embeddings."""

import asyncio
import importlib.util
import os
from pathlib import Path

# LangChain's embeddings tokenise with OpenAI's vocabulary, which `tiktoken` would fetch from another host; litellm ships it.
os.environ["TIKTOKEN_CACHE_DIR"] = str(
    Path(importlib.util.find_spec("litellm").origin).parent / "litellm_core_utils" / "tokenizers"
)

import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from scenarios import ANSWER, EMBEDDING_MODEL, MODEL, main, scenario


def chat(url, **options):
    return ChatOpenAI(model=MODEL, base_url=url, api_key="none", max_retries=0, **options)


def check(text):
    assert text == ANSWER, text


@scenario
def invoke(url):
    message = chat(url).invoke("What is two plus two?")
    check(message.content)
    assert message.usage_metadata["output_tokens"] > 0


@scenario
def invoke_with_settings(url):
    model = chat(
        url, temperature=0.3, max_tokens=64, seed=7, top_p=0.9, frequency_penalty=0.2, presence_penalty=0.1,
        logit_bias={5: -1}, stop=["###"], model_kwargs={"user": "ann"}, extra_body={"top_k": 20, "min_p": 0.1},
    )  # fmt: skip
    check(model.invoke([("system", "Be brief."), ("human", "What is two plus two?")]).content)


@scenario
def invoke_with_reasoning_effort(url):
    check(chat(url, reasoning_effort="low", verbosity="low").invoke("What is two plus two?").content)


@scenario
def later_system_message(url):
    turns = [("system", "Be brief."), ("human", "Two?"), ("ai", "Four."), ("system", "In English."), ("human", "Two?")]
    check(chat(url).invoke(turns).content)


@scenario
def prefill(url):
    check(chat(url).invoke([("human", "What is two plus two?"), ("ai", "Two plus")]).content)


@scenario
def answer_sent_back_with_a_name(url):
    model = chat(url)
    first = model.invoke("What is two plus two?")
    first.name = "assistant-1"
    check(model.invoke([("human", "Two?"), first, ("human", "Three?")]).content)


@scenario
def stream(url):
    check("".join(chunk.content for chunk in chat(url, stream_usage=True).stream("What is two plus two?")))


@scenario
def asynchronous(url):
    async def work():
        check((await chat(url).ainvoke("What is two plus two?")).content)
        check("".join([chunk.content async for chunk in chat(url).astream("What is two plus two?")]))

    asyncio.run(work())


@scenario
def batch(url):
    for message in chat(url).batch(["Two?", "Three?", "Four?"]):
        check(message.content)


@scenario
def stop_and_several_choices(url):
    assert chat(url).bind(stop=[" is"]).invoke("Two?").content == "Two plus two"
    (generations,) = chat(url, n=2, temperature=0.7).generate([[HumanMessage("Two?")]]).generations
    assert len(generations) == 2


@scenario
def logprobs(url):
    message = chat(url, logprobs=True, top_logprobs=2).invoke("Two?")
    assert len(message.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@scenario
def responses_protocol(url):
    model = chat(url, use_responses_api=True, output_version="responses/v1")
    first = model.invoke("What is two plus two?")
    check(first.text)
    check(model.invoke([("human", "Two?"), first, ("human", "Three?")]).text)
    check("".join(chunk.text for chunk in model.stream("What is two plus two?")))


@scenario
def completions(url):
    model = OpenAI(model=MODEL, base_url=url, api_key="none", max_retries=0)
    check(model.invoke("Two plus two is"))
    check("".join(model.stream("Two plus two is")))


@scenario
def errors_of_token_ids(url):
    """By default it sends ids of OpenAI's vocabulary, which are other words to any other model: the error says what helps."""
    model = OpenAIEmbeddings(model=EMBEDDING_MODEL, base_url=url, api_key="none", max_retries=0)
    try:
        model.embed_documents(["Grüße aus 東京: seventeen anthropologists"])
    except openai.BadRequestError as error:
        fault = error
    assert "check_embedding_ctx_length" in str(fault)


@scenario
def embeddings_of_texts(url):
    model = OpenAIEmbeddings(
        model=EMBEDDING_MODEL,
        base_url=url,
        api_key="none",
        max_retries=0,
        check_embedding_ctx_length=False,
        dimensions=64,
    )
    assert [len(vector) for vector in model.embed_documents(["Two plus two is four.", "Grüße"])] == [64, 64]


if __name__ == "__main__":
    main()
