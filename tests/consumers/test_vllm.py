"""A merged folder is one model to vLLM, as its users start it, without corral's engine."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

from tests.consumers.cases import CHATS, LONGEST, build


@pytest.mark.parametrize(("rope", "tied"), [("llama3", True), ("yarn", False)])
def test_a_merged_folder_is_the_same_model(rope: str, tied: bool, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    # Heads of 32: vLLM has no kernels for smaller ones.
    case = build(tmp_path, tiny_tokenizer, rope, tied=tied, hidden_size=128)
    llm: Any = LLM(str(case.folder), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**28)
    answers = SamplingParams(temperature=0, max_tokens=24)
    for chat, prompt, answer in zip(CHATS, case.prompts, case.answers, strict=True):
        (done,) = llm.chat(chat.to_json()["messages"], answers)
        assert done.prompt_token_ids == prompt
        assert list(done.outputs[0].token_ids) == answer
    ids = case.ids[: LONGEST - 1]
    (done,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0))
    logprobs = [position[id_].logprob for id_, position in zip(ids[1:], done.prompt_logprobs[1:], strict=True)]
    assert logprobs == pytest.approx(case.logprobs[: len(logprobs)], abs=1e-3)
    del llm
    gc.collect()
