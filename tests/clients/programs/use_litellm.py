"""litellm, with the prefixes under which its users name a server of their own."""

import asyncio
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks another host for prices

import litellm
from scenarios import ANSWER, ASK, EMBEDDING_MODEL, LATER_SYSTEM, MODEL, PREFILL, main, scenario

litellm.telemetry = False


def settings(url, prefix="openai", model=MODEL):
    return {"model": f"{prefix}/{model}", "api_base": url, "api_key": "none", "num_retries": 0, "max_retries": 0}


def check(text):
    assert text == ANSWER, text


def chat(url, messages=ASK, prefix="openai", **options):
    check(litellm.completion(messages=messages, **settings(url, prefix), **options).choices[0].message.content)


def stream(url, **options):
    chunks = litellm.completion(
        messages=ASK, stream=True, **settings(url, **options), stream_options={"include_usage": True}
    )
    check("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))


@scenario
def plain(url):
    chat(url)


@scenario
def as_vllm(url):
    chat(url, prefix="hosted_vllm", top_k=20, min_p=0.05, repetition_penalty=1.1, temperature=0.5)
    stream(url, prefix="hosted_vllm")


@scenario
def as_lm_studio_and_llamafile(url):
    chat(url, prefix="lm_studio")
    chat(url, prefix="llamafile")


@scenario
def as_its_own_proxy(url):
    chat(url, prefix="litellm_proxy", metadata={"tags": ["a"]})


@scenario
def with_settings(url):
    chat(
        url, temperature=0.3, top_p=0.9, n=1, max_tokens=64, stop=["###", "END"], presence_penalty=0.1, seed=7,
        frequency_penalty=0.1, logit_bias={"5": -1}, user="ann", response_format={"type": "text"},
    )  # fmt: skip


@scenario
def with_effort(url):
    chat(url, allowed_openai_params=["reasoning_effort"], reasoning_effort="low")


@scenario
def later_system_message(url):
    chat(url, LATER_SYSTEM)


@scenario
def prefill(url):
    chat(url, [PREFILL[0], {**PREFILL[1], "prefix": True}])


@scenario
def cache_marks(url):
    part = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    chat(url, [{"role": "system", "content": [part]}, *ASK])


@scenario
def answer_sent_back(url):
    answer = litellm.completion(messages=ASK, **settings(url))
    chat(url, [*ASK, answer.choices[0].message, *ASK])
    chat(url, [*ASK, answer.choices[0].message.model_dump(), *ASK])


@scenario
def streamed(url):
    stream(url)


@scenario
def asynchronous(url):
    async def work():
        answer = await litellm.acompletion(messages=ASK, **settings(url))
        check(answer.choices[0].message.content)

    asyncio.run(work())


@scenario
def several_choices_with_logprobs(url):
    answer = litellm.completion(messages=ASK, n=2, temperature=0.8, logprobs=True, top_logprobs=2, **settings(url))
    assert len(answer.choices) == 2


@scenario
def text_completion(url):
    options = settings(url, "text-completion-openai")
    check(litellm.text_completion(prompt="Two plus two is", max_tokens=32, **options).choices[0].text)


@scenario
def embeddings(url):
    options = settings(url, model=EMBEDDING_MODEL)
    assert len(litellm.embedding(input=["Two plus two is four.", "Grüße"], **options).data) == 2
    assert len(litellm.embedding(input=[[2048, 4606]], **options).data) == 1


@scenario
def responses(url):
    check(litellm.responses(input="What is two plus two?", **settings(url)).output_text)


@scenario
def errors(url):
    try:
        litellm.completion(messages=ASK, **settings(url, model="absent"))
    except litellm.NotFoundError:
        return
    raise AssertionError("no error")


if __name__ == "__main__":
    main()
