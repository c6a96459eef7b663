"""Completions by OpenVINO that GenAI cannot compute: one token of one choice after another.

GenAI has no biases, and its frequency and presence penalties favour what they are to avoid where its logit is below 0 (as of
2026.4.1). Such a request is computed by plain inference and sampled as by the transformers engine. Each choice has keys and
values of its own: one alone is as fast as with GenAI, many take turns.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from corral.engines.base import Sampling
from corral.engines.openvino_inference import PART_TOKENS, Inference, Model

Key: TypeAlias = tuple[int, int]

AT_ONCE = 4
"""Choices under way, whose keys and values are in memory."""


@dataclass
class _Choice:
    ids: list[int]
    """The prompt and the answer so far."""
    prompt: int
    """Length of the prompt."""
    sampling: Sampling
    random: random.Random
    changes: Any
    inference: Inference | None = None


@dataclass
class Step:
    """What one step brought a choice."""

    ids: list[int]
    finish: str | None = None
    logprobs: list[float] | None = None
    tops: list[list[tuple[int, float]]] | None = None
    failure: str | None = None


class Stepper:
    """Computes choices, the oldest first, a few at a time."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._choices: dict[Key, _Choice] = {}

    @property
    def busy(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._choices)

    def add(self, key: Key, ids: list[int], sampling: Sampling, seed: int) -> None:
        """Take a choice; `step` yields its ids under this key."""
        import torch

        from corral.engines.token_sampling import LogitChanges

        changes = LogitChanges(sampling, ids, self._model.vocabulary, torch.device("cpu"))
        self._choices[key] = _Choice(list(ids), len(ids), sampling, random.Random(seed), changes)

    def cancel(self, request: int, choice: int | None) -> None:
        """Drop one choice of a request, or all."""
        for key in [key for key in self._choices if key[0] == request and choice in (None, key[1])]:
            del self._choices[key]

    def step(self) -> Iterator[tuple[Key, Step]]:
        """Compute one token, or a part of the prompt, of each choice whose turn it is."""
        for key, choice in list(self._choices.items())[:AT_ONCE]:
            try:
                step = self._advance(choice)
            except Exception as error:  # one choice that fails must not end the others
                step = Step([], failure=f"{type(error).__name__}: {error}")
            if step is not None:
                if step.finish or step.failure:
                    del self._choices[key]
                yield key, step

    def _advance(self, choice: _Choice) -> Step | None:
        """Returns: None if the prompt is not computed yet."""
        import torch

        from corral.engines.token_sampling import changed, sample
        from corral.model.compute.token_logprobs import most_likely

        inference = choice.inference = choice.inference or self._model.new_inference()
        logits = inference.logits(choice.ids[: inference.computed + PART_TOKENS])
        if inference.computed < len(choice.ids):
            return None
        row = torch.from_numpy(logits[-1:].copy())
        if not row.amax().isfinite():
            return Step([], failure="the model's logits are not finite numbers")
        sampling = choice.sampling
        id_ = int(sample(changed(row, [choice.changes]), [sampling], [1 - choice.random.random()]))
        if id_ in sampling.stop_ids:
            return Step([], "stop")
        choice.ids.append(id_)
        choice.changes.add(id_)
        step = Step([id_], "length" if len(choice.ids) - choice.prompt == sampling.max_tokens else None)
        if sampling.logprobs:
            logprobs = row.log_softmax(-1)
            step.logprobs = [float(logprobs[0, id_])]
            step.tops = most_likely(logprobs, sampling.top_logprobs) if sampling.top_logprobs else None
        return step
