"""What programs send that are no Python packages: bodies written after their public documentation, with texts of ours.

`ANSWERED` bodies get an answer: what they add is honoured, changes nothing, or concerns only the program itself. `REFUSED`
bodies ask for something that would change what the answer means, so that ignoring it would mislead: they get a 400 that names
the field.
"""

from __future__ import annotations

from typing import Any

CHAT, TEXT, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
MODEL, EMBEDDING_MODEL = "m", "all-minilm-l6-v2"

Body = dict[str, Any]

_ASK = [{"role": "user", "content": "What is two plus two?"}]
_SYSTEM = [{"role": "system", "content": "Answer in one sentence."}, *_ASK]
_TURNS = [*_SYSTEM, {"role": "assistant", "content": "Four."}, {"role": "user", "content": "And three plus three?"}]


def _chat(messages: list[Body] = _ASK, **fields: Any) -> tuple[str, Body]:
    return CHAT, {"model": MODEL, "messages": messages, **fields}


def _text(prompt: Any = "Two plus two is", **fields: Any) -> tuple[str, Body]:
    return TEXT, {"model": MODEL, "prompt": prompt, **fields}


def _embed(input_: Any, **fields: Any) -> tuple[str, Body]:
    return EMBED, {"model": EMBEDDING_MODEL, "input": input_, **fields}


_NEUTRAL_SAMPLERS: Body = {
    "temperature": 0.7,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "typical_p": 1,
    "tfs": 1,
    "top_a": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "smoothing_factor": 0,
    "dynatemp_range": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "length_penalty": 1,
    "early_stopping": False,
    "guidance_scale": 1,
    "negative_prompt": "",
    "seed": -1,
    "ban_eos_token": False,
    "skip_special_tokens": True,
    "add_bos_token": True,
    "truncation_length": 4096,
}
"""As text-generation UIs send them: every slider they have, at the place where it does nothing."""

ANSWERED: dict[str, tuple[str, Body]] = {
    # ---- Open WebUI
    "Open WebUI: a chat": _chat(_TURNS, stream=True, stream_options={"include_usage": True}),
    "Open WebUI: advanced parameters": _chat(
        _SYSTEM,
        stream=True,
        temperature=0.8,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        frequency_penalty=0.1,
        presence_penalty=0.1,
        repeat_penalty=1.1,
        seed=0,
        stop=["\n\n"],
        max_tokens=128,
        logit_bias={"100": -100},
        reasoning_effort="medium",
    ),
    "Open WebUI: a task, as titles, tags and follow-ups": _chat(
        stream=False, max_completion_tokens=1000, metadata={"task": "title_generation", "chat_id": "c-1"}
    ),
    "Open WebUI: fields of its own": _chat(
        stream=True,
        session_id="s-1",
        chat_id="c-1",
        id="msg-1",
        background_tasks={"title_generation": True, "tags_generation": True},
        features={"web_search": False, "code_interpreter": False, "image_generation": False},
        variables={"{{USER_NAME}}": "Ann"},
        model_item={"id": MODEL, "object": "model"},
    ),
    "Open WebUI: as to Ollama": _chat(
        stream=True, options={"num_ctx": 4096, "temperature": 0.2, "num_predict": 64, "top_k": 20}, keep_alive="5m"
    ),
    "Open WebUI: retrieved passages as a later system message": _chat(
        [*_TURNS[:3], {"role": "system", "content": "Context: three plus three is six."}, _TURNS[3]]
    ),
    "Open WebUI: continue the answer": _chat([*_SYSTEM, {"role": "assistant", "content": "Two plus"}]),
    # ---- LibreChat
    "LibreChat: a chat": _chat(
        _TURNS,
        stream=True,
        user="6650f0c2a1b2c3d4e5f60718",
        temperature=1,
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0,
        stream_options={"include_usage": True},
    ),
    "LibreChat: a title": _chat(_SYSTEM, temperature=0.2, presence_penalty=0, frequency_penalty=0, max_tokens=16, n=1),
    "LibreChat: named users": _chat([{"role": "user", "name": "Ann", "content": [{"type": "text", "text": "Hello"}]}]),
    "LibreChat: added parameters": _chat(safe_prompt=True, stop=["<|im_end|>", "User:"], verbosity="low"),
    # ---- SillyTavern
    "SillyTavern: a chat": _chat(
        [
            {"role": "system", "content": "Write Bob's next reply in a chat between Bob and Ann."},
            {"role": "system", "content": "[Start a new chat]"},
            {"role": "assistant", "content": "Hello, Ann."},
            {"role": "user", "content": "What is two plus two?"},
            {"role": "system", "content": "[Write in the style of Bob]"},
        ],
        temperature=1,
        max_tokens=300,
        stream=True,
        presence_penalty=0,
        frequency_penalty=0,
        top_p=1,
        stop=[],
    ),
    "SillyTavern: with a prefix of the answer": _chat([*_ASK, {"role": "assistant", "content": "Bob:"}], stream=True),
    "SillyTavern: only a system prompt": _chat([{"role": "system", "content": "Say hello."}]),
    "SillyTavern: further parameters": _chat(
        top_k=0, min_p=0, top_a=0, repetition_penalty=1, include_reasoning=False, reasoning_effort="auto", seed=-1
    ),
    "SillyTavern: text completion": _text(
        stream=True,
        max_tokens=100,
        max_new_tokens=100,
        n_predict=100,
        stop=["\nAnn:", "\nUser:", "<|im_end|>", "</s>", "\n***", "<|eot_id|>"],
        stopping_strings=["\nAnn:"],
        sampler_seed=-1,
        sampler_order=[6, 0, 1, 3, 4, 2, 5],
        custom_token_bans="",
        banned_strings=[],
        api_type="generic",
        api_server="http://127.0.0.1:8000",
        **_NEUTRAL_SAMPLERS,
    ),
    # ---- Continue
    "Continue: a chat": _chat(_TURNS, stream=True, max_tokens=2048, temperature=0.5, stop=["<|im_end|>"]),
    "Continue: an empty turn": _chat([{"role": "system", "content": " "}, {"role": "user", "content": " "}]),
    "Continue: autocompletion of code": _text(
        "def double(x):\n    return",
        stream=True,
        max_tokens=64,
        temperature=0.01,
        stop=["\n\n", "/src/", "#- coding: utf-8", "```"],
    ),
    "Continue: passages": _embed(["def double(x): return 2 * x", "Two plus two is four."]),
    # ---- AnythingLLM
    "AnythingLLM: a chat": _chat(_SYSTEM, stream=True, temperature=0.7, max_tokens=1024),
    "AnythingLLM: a limit from the environment, which is text": _chat(_SYSTEM, temperature=0.7, max_tokens="1024"),
    "AnythingLLM: passages": _embed(["Two plus two is four.", "Grüße aus 東京 🙂"], encoding_format="float"),
    # ---- Chatbox, LobeChat, NextChat, Jan, Cherry Studio
    "LobeChat: a chat": _chat(
        _SYSTEM,
        stream=True,
        temperature=1,
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0,
        stream_options={"include_usage": True},
    ),
    "NextChat: a chat": _chat(
        [*_SYSTEM], stream=True, temperature=0.5, presence_penalty=0, frequency_penalty=0, top_p=1, max_tokens=4000
    ),
    "Jan: a chat": _chat(
        stream=True,
        max_tokens=2048,
        stop=[],
        frequency_penalty=0,
        presence_penalty=0,
        temperature=0.7,
        top_p=0.95,
        ctx_len=2048,
    ),
    "Cherry Studio: a chat": _chat(
        stream=True,
        stream_options={"include_usage": True},
        enable_thinking=False,
        chat_template_kwargs={"enable_thinking": False},
    ),
    # ---- agents and SDKs in other languages
    "Vercel AI SDK: a chat": _chat(
        [{"role": "user", "content": [{"type": "text", "text": "What is two plus two?"}]}],
        stream=True,
        max_tokens=256,
        temperature=0,
    ),
    "OpenRouter's clients: routing fields": _chat(
        models=[MODEL],
        provider={"order": ["corral"]},
        route="fallback",
        transforms=["middle-out"],
        usage={"include": True},
    ),
    "Anthropic's cache marks": _chat(
        [
            {
                "role": "system",
                "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            },
            *_ASK,
        ]
    ),
    "An answer sent back with its reasoning": _chat(
        [
            *_ASK,
            {"role": "assistant", "content": "Four.", "reasoning_content": "2 + 2", "refusal": None, "annotations": []},
            {"role": "user", "content": "And three plus three?"},
        ]
    ),
    "An answer without content": _chat([*_ASK, {"role": "assistant", "content": None}, *_ASK]),
    "Both limits": _chat(max_tokens=32, max_completion_tokens=64),
    "A limit beyond the context": _chat(max_tokens=1_000_000),
    "An empty stop string": _chat(stop=""),
    "Sixteen stop strings": _chat(stop=[f"<stop {i}>" for i in range(16)]),
    "Every field null": _chat(
        **dict.fromkeys(
            (
                "temperature",
                "top_p",
                "n",
                "stop",
                "max_tokens",
                "seed",
                "tools",
                "logit_bias",
                "user",
                "stream",
                "top_logprobs",
            )
        )
    ),
    # ---- Ollama's options
    "Ollama's options": _chat(
        options={
            "num_ctx": 2048,
            "num_predict": 32,
            "temperature": 0.3,
            "top_p": 0.9,
            "top_k": 40,
            "seed": 7,
            "stop": ["\n\n"],
        },
        keep_alive=-1,
        think=False,
    ),
    "Ollama's machine options": _chat(
        options={"num_gpu": 1, "num_thread": 4, "use_mmap": True, "num_batch": 512}, raw=False
    ),
    # ---- vLLM's extra_body
    "vLLM: neutral values": _chat(
        best_of=1,
        use_beam_search=False,
        top_k=-1,
        min_p=0.0,
        repetition_penalty=1.0,
        length_penalty=1.0,
        stop_token_ids=[],
        include_stop_str_in_output=False,
        ignore_eos=False,
        min_tokens=0,
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        truncate_prompt_tokens=None,
        prompt_logprobs=None,
        echo=False,
        add_generation_prompt=True,
        continue_final_message=False,
        add_special_tokens=False,
        documents=None,
        chat_template=None,
        chat_template_kwargs=None,
        guided_json=None,
        priority=0,
        request_id="r-1",
        return_tokens_as_token_ids=False,
        cache_salt="salt",
    ),
    "vLLM: samplers": _chat(
        top_k=20, min_p=0.05, repetition_penalty=1.1, stop_token_ids=[5], min_tokens=2, max_tokens=16
    ),
    "vLLM: continue the last message": _chat(
        [*_ASK, {"role": "assistant", "content": "Two plus two"}],
        add_generation_prompt=False,
        continue_final_message=True,
    ),
    "vLLM: log-probabilities": _chat(logprobs=True, top_logprobs=5, max_tokens=8),
    "vLLM: completion of ids": _text(
        [5, 6, 7, 8], max_tokens=8, min_p=0, repetition_penalty=1.0, ignore_eos=False, top_k=-1
    ),
    # ---- llama.cpp's server
    "llama.cpp: a chat": _chat(
        stream=True,
        cache_prompt=True,
        samplers="edkypmxt",
        temperature=0.8,
        dynatemp_range=0,
        dynatemp_exponent=1,
        top_k=40,
        top_p=0.95,
        min_p=0.05,
        typical_p=1,
        xtc_probability=0,
        xtc_threshold=0.1,
        repeat_last_n=64,
        repeat_penalty=1,
        presence_penalty=0,
        frequency_penalty=0,
        dry_multiplier=0,
        dry_base=1.75,
        dry_allowed_length=2,
        dry_penalty_last_n=-1,
        max_tokens=-1,
        timings_per_token=True,
        return_progress=True,
        reasoning_format="auto",
    ),
    "llama.cpp: a completion": _text(
        n_predict=16, cache_prompt=True, id_slot=-1, n_probs=0, stream=False, max_tokens=16
    ),
    "text-generation-webui: a chat": _chat(
        mode="instruct", character=None, instruction_template=None, preset=None, max_tokens=32, **_NEUTRAL_SAMPLERS
    ),
    # ---- embeddings
    "Embeddings of token ids": _embed([2023, 2003, 1037]),
    "Embeddings of several lists of token ids": _embed([[2023, 2003], [1037, 3231]]),
    "Embeddings as base64": _embed("Two plus two is four.", encoding_format="base64", user="ann"),
    "Embeddings with fewer dimensions": _embed("Two plus two is four.", dimensions=128),
    "Embeddings of a long text": _embed("Two plus two is four. " * 200),
    "Embeddings with vendors' fields": _embed("Two", input_type="query", truncate="END", keep_alive="5m", options={}),
}
"""Name → path and body of a request that gets an answer."""

_WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
_PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

REFUSED: dict[str, tuple[str, Body, str]] = {
    "tools to call": (*_chat(tools=[_WEATHER]), "tools"),
    "a tool that must be called": (*_chat(tools=[_WEATHER], tool_choice="required"), "tool"),
    "old-style functions": (*_chat(functions=[_WEATHER["function"]]), "functions"),
    "an answer in JSON": (*_chat(response_format={"type": "json_object"}), "response_format"),
    "an answer of a schema": (
        *_chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}),
        "response_format",
    ),
    "vLLM's guided decoding": (*_chat(guided_json={"type": "object"}), "guided_json"),
    "llama.cpp's grammar": (*_chat(grammar='root ::= "a"'), "grammar"),
    "Ollama's format": (*_chat(format="json"), "format"),
    "a picture": (*_chat([{"role": "user", "content": [_PICTURE]}]), "messages[0].content[0]"),
    "speech": (*_chat(modalities=["text", "audio"], audio={"voice": "a", "format": "wav"}), ""),
    "a web search": (*_chat(web_search_options={}), "web_search_options"),
    "the result of a tool": (*_chat([*_ASK, {"role": "tool", "tool_call_id": "1", "content": "4"}]), "messages[1]"),
    "a template of the client's": (*_chat(chat_template="{{ messages }}"), "chat_template"),
    "beam search": (*_chat(use_beam_search=True), "use_beam_search"),
    "the best of several": (*_text(best_of=4), "best_of"),
    "filling in the middle": (*_text(suffix="is four."), "suffix"),
    "more stop strings than are served": (*_chat(stop=[str(i) for i in range(17)]), "stop"),
    "more choices than are served": (*_chat(n=100), "n"),
    "a penalty out of range": (*_chat(frequency_penalty=3), "frequency_penalty"),
    "no messages": (*_chat([]), "messages"),
    "another sampler": (*_chat(mirostat_mode=2), "mirostat_mode"),
}
"""Name → path, body, and the start of the field that the error names."""
