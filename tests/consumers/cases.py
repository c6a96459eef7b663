"""Merged folders of each rotary embedding, with tied and untied heads, and what plain transformers computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from corral.messages import Conversation
from corral.model import merging
from corral.model.loading import load_model, load_template, resolve_model
from corral.template import Template
from tests.conftest import change_json, make_tiny_model

CHATS = (
    Conversation.from_turns(("user", "What is 2 + 2?")),
    Conversation.from_turns(
        ("system", "Be kind."), ("user", "Grüße, 東京!\n\tHi"), ("assistant", "So  kind."), ("user", "12345")
    ),
)
ORIGINAL, LONGEST = 64, 256
LENGTH = 300
"""Of the ids that are scored: beyond both lengths, where `longrope` and `dynamic` change their frequencies."""

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 16.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "factor": 3.0,  # not the ratio of the two lengths
        "short_factor": [1.0 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    },
}
CASES = [(rope, tied) for rope in ROPES for tied in (True, False)]


@dataclass(frozen=True, slots=True)
class Case:
    """A merged folder and what every program must make of it.

    Args:
        folder: as `corral run` writes it.
        template: of the model it was merged from.
        ids: to score.
        logprobs: of `ids` after the first.
        answers: the greedy answer to each of `CHATS`, with its end token if it ends.
    """

    folder: Path
    template: Template
    ids: list[int]
    logprobs: list[float]
    answers: list[list[int]]

    @property
    def prompts(self) -> list[list[int]]:
        return [self.template.prompt(chat) for chat in CHATS]


def build(folder: Path, tokenizer: Any, rope: str, *, tied: bool, **shape: int) -> Case:
    """A random model that transformers 4 wrote with that rotary embedding, merged by corral.

    Its generation config names a token that the first answer soon reaches, which neither template nor tokenizer knows as an
    end.

    Args:
        tokenizer: the tiny one.
        rope: one of `ROPES`.
        tied: whether the head is the embedding.
        shape: other sizes than those of the tiny model.
    """
    base, merged = folder / "base", folder / "merged"
    parameters = {"rope_type": rope, "rope_theta": 50000.0, **ROPES[rope]}
    plain = make_tiny_model(
        len(tokenizer), rope_parameters=parameters, max_position_embeddings=LONGEST, tie_word_embeddings=tied, **shape
    )
    plain.save_pretrained(base)
    scaling = {"type" if rope == "linear" else "rope_type": rope, **ROPES[rope]}
    older = {"rope_theta": 50000.0, "rope_scaling": None if rope == "default" else scaling}
    change_json(base / "config.json", lambda config: config.pop("rope_parameters"), **older)
    Template.load(tokenizer, "chatml").save(base)
    prompts = [load_template(base).prompt(chat) for chat in CHATS]
    answer = greedy(plain, prompts[0], [2])[2:]
    end = next(id_ for id_ in answer if (text := tokenizer.decode([id_])).isascii() and text.isprintable())
    change_json(base / "generation_config.json", eos_token_id=[2, end])
    template = load_template(base)
    merged.mkdir()
    merging.save_model(load_model(resolve_model(str(base))), template, merged, licences=())
    ids = torch.randint(3, len(tokenizer), (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    answers = [greedy(plain, prompt, [2, end]) for prompt in prompts]
    assert answers[0][-1] == end
    return Case(merged, template, ids, logprobs(plain, ids), answers)


def greedy(model: Any, prompt: Sequence[int], stops: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": stops, "pad_token_id": 2}
    whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
    return whole[0, len(prompt) :].tolist()


def logprobs(model: Any, ids: Sequence[int]) -> list[float]:
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
