"""GGUF files computed by llama.cpp, through the bindings of xllamacpp."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

from corral.messages import Conversation


class Llama:
    """One GGUF file in llama.cpp."""

    def __init__(self, module: Any, path: Path, context: int) -> None:
        params = module.CommonParams()
        params.model.path = str(path)
        params.n_ctx = context
        params.n_gpu_layers = 0
        params.cache_type_k = params.cache_type_v = module.ggml_type.GGML_TYPE_F32
        params.cache_ram_mib = 0
        params.n_threads_http = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = params.fit_params = params.ui = False
        params.verbosity = -1
        self.server = module.Server(params)

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())

    def ids(self, text: str, *, bos: bool = True) -> list[int]:
        return self.post("/tokenize", content=text, add_special=bos, parse_special=True)["tokens"]

    def chat_ids(self, conversation: Conversation) -> list[int]:
        return self.ids(self.post("/apply-template", **conversation.to_json())["prompt"])

    def logprobs(self, ids: list[int], count: int) -> list[float]:
        """Of each id to follow `ids`, NaN for those that llama.cpp leaves out."""
        # A letter is made certain, as of an end token, or half a character, nothing would be said; log-probs are from before.
        body = {"prompt": ids, "n_predict": 1, "temperature": -1, "n_probs": count, "cache_prompt": False}
        answer = self.server.handle_completions(body | {"logit_bias": [[self.ids("a", bos=False)[0], 1000.0]]})
        values = [math.nan] * count
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values

    def greedy(self, ids: list[int], count: int) -> list[int]:
        body = {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 1, "repeat_penalty": 1.0}
        return [entry["id"] for entry in self.server.handle_completions(body)["choices"][0]["logprobs"]["content"]]
