"""The process in which OpenVINO GenAI computes: requests as JSON lines on standard input, events on standard output.

A process of its own, as each `step()` holds Python's lock for up to half a second. n choices of one prompt are n requests
here, so that each streams, stops and is cancelled by itself; all but the first wait until the first has its prompt
computed, and then take it from the prefix cache. A choice starts once the key-value cache has room for its full length:
were it short of room, OpenVINO would take blocks back from one under way, and what shares a prefix with that one would go
on with wrong keys and values, without a word (so in 2026.4.1). Scores come from a second pipeline without prefix cache,
made when first asked for: a cached prompt has no log-probabilities.

Lines in: `["submit", id, ids, sampling, seeds]`, `["score", id, ids]`, `["cancel", id, choice]`. Lines out: one list of
events a step, each `["delta", id, choice, ids, log-probs or null, finish or null]`, `["score", id, log-probs]` or
`["fail", id, why]`. This module knows nothing about event loops, folders of other kinds, or text.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

Event: TypeAlias = list[Any]

BLOCK_TOKENS = 32
"""Tokens in a block of OpenVINO's key-value cache on a CPU; shorter prompts cannot be shared."""
SCORE_TOKENS = 256
"""Tokens of a pass that scores: its logits, [tokens, vocabulary], are all in memory."""


@dataclass
class _Prompt:
    """What the choices of one request have in common."""

    ids: list[int]
    stops: frozenset[int]
    logprobs: bool
    blocks: int
    """Of the key-value cache, for a choice of full length."""
    warm: bool
    """Whether it is computed, or too short to be shared: choices need not wait for one another."""
    leader: int | None = None
    """The choice that computes it."""


@dataclass
class _Choice:
    prompt: _Prompt
    config: Any
    handle: Any = None
    """None while it waits in line."""


@dataclass
class _Scoring:
    length: int
    handle: Any
    values: list[float] = field(default_factory=list[float])


class Worker:
    """The pipelines and what is under way in them.

    Args:
        settings: `folder`, `properties` (of OpenVINO), `blocks` and `score_blocks` (of the key-value cache).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino_genai

        self._genai: Any = openvino_genai
        self._settings = settings
        self._generating: Any = self._pipeline(settings["blocks"], 512, prefixes=True)
        self._scoring: Any = None
        self._line: dict[tuple[int, int], _Choice] = {}
        """Choices that wait, the oldest request first."""
        self._choices: dict[tuple[int, int], _Choice] = {}
        """Choices under way."""
        self._leaving = 0
        """Blocks of choices that were cancelled; the next step gives them back."""
        self._scores: dict[int, _Scoring] = {}
        self._ids = 0

    def _pipeline(self, blocks: int, tokens: int, *, prefixes: bool) -> Any:
        config = self._genai.SchedulerConfig()
        config.num_kv_blocks = blocks
        config.enable_prefix_caching = prefixes
        config.max_num_batched_tokens = tokens
        settings = self._settings
        return self._genai.ContinuousBatchingPipeline(settings["folder"], config, "CPU", settings["properties"])

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._line or self._choices or self._leaving or self._scores)

    def run_command(self, command: list[Any]) -> Iterator[Event]:
        """Take a command; yields why it cannot be done."""
        name, request, *rest = command
        try:
            if name == "submit":
                self._submit(request, *rest)
            elif name == "score":
                self._score(request, *rest)
            else:
                self._cancel(request, *rest)
        except Exception as error:  # what one request brings must not end the others
            yield ["fail", request, f"{type(error).__name__}: {error}"]

    def _submit(self, request: int, ids: list[int], sampling: dict[str, Any], seeds: list[int]) -> None:
        stops = frozenset(sampling["stop_ids"])
        blocks = -(-(len(ids) + sampling["max_tokens"]) // BLOCK_TOKENS) + 1  # one to grow into
        prompt = _Prompt(ids, stops, sampling["logprobs"], blocks, warm=len(ids) <= BLOCK_TOKENS)
        choices = [_Choice(prompt, self._config(sampling, seed)) for seed in seeds]
        self._line.update({(request, number): choice for number, choice in enumerate(choices)})

    def _admit(self) -> None:
        """Start choices that need not wait for their leader, as far as there is room."""
        room = self._settings["blocks"] - self._leaving - sum(c.prompt.blocks for c in self._choices.values())
        for key, choice in list(self._line.items()):
            prompt = choice.prompt
            if prompt.blocks > room:
                return
            if prompt.warm or prompt.leader is None:
                prompt.leader = key[1]
                choice.handle = self._add(self._generating, prompt.ids, choice.config)
                self._choices[key] = self._line.pop(key)
                room -= prompt.blocks

    def _score(self, request: int, ids: list[int]) -> None:
        if self._scoring is None:
            self._scoring = self._pipeline(self._settings["score_blocks"], SCORE_TOKENS, prefixes=False)
        config = self._genai.GenerationConfig(max_new_tokens=1, echo=True, logprobs=1, ignore_eos=True)
        config.set_eos_token_id(0)
        self._scores[request] = _Scoring(len(ids), self._add(self._scoring, ids, config))

    def _cancel(self, request: int, number: int | None) -> None:
        def named(keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
            return [key for key in keys if key[0] == request and number in (None, key[1])]

        for key in named(self._line):
            del self._line[key]
        for key in named(self._choices):
            choice = self._choices.pop(key)
            choice.handle.cancel()
            self._leaving += choice.prompt.blocks
            if choice.prompt.leader == key[1]:
                choice.prompt.leader = None  # if it was not done, the next in line computes the prompt
        if number is None and request in self._scores:
            self._scores.pop(request).handle.cancel()

    def _add(self, pipeline: Any, ids: list[int], config: Any) -> Any:
        import numpy as np
        import openvino as ov

        self._ids += 1
        return pipeline.add_request(self._ids, ov.Tensor(np.array([ids], dtype=np.int64)), config)

    def _config(self, sampling: dict[str, Any], seed: int) -> Any:
        config = self._genai.GenerationConfig(max_new_tokens=sampling["max_tokens"], logprobs=int(sampling["logprobs"]))
        stops: list[int] = sampling["stop_ids"]
        config.stop_token_ids = set(stops)
        config.set_eos_token_id(stops[0] if stops else 0)  # without one, that of the folder is taken
        config.ignore_eos = not stops
        if sampling["temperature"] > 0:
            config.do_sample = True
            config.temperature = sampling["temperature"]
            config.top_p = sampling["top_p"]
            config.rng_seed = seed
            if sampling["top_k"]:
                config.top_k = sampling["top_k"]
        return config

    def step(self) -> Iterator[Event]:
        """Compute one token of everything under way; yields what came of it."""
        self._admit()
        if self._choices or self._leaving:
            self._generating.step()
            self._leaving = 0
            for request, choice in list(self._choices):
                yield from self._read(request, choice)
        if self._scores:
            self._scoring.step()
            for request in list(self._scores):
                yield from self._read_score(request)

    def _read(self, request: int, number: int) -> Iterator[Event]:
        choice = self._choices[request, number]
        ids: list[int] = []
        logprobs: list[float] = []
        finish: str | None = None
        for output in _outputs(choice.handle):
            ids += output.generated_ids
            logprobs += output.generated_log_probs
            if output.finish_reason != self._genai.GenerationFinishReason.NONE:
                finish = "stop" if ids and ids[-1] in choice.prompt.stops else "length"
        if finish == "stop":
            ids.pop()
            del logprobs[len(ids) :]
        failure = None if finish else self._failure(choice.handle)
        if finish or failure:
            del self._choices[request, number]
        choice.prompt.warm |= bool(ids or finish or failure)
        if failure:
            yield ["fail", request, failure]
        elif ids or finish:
            yield ["delta", request, number, ids, logprobs if choice.prompt.logprobs else None, finish]

    def _read_score(self, request: int) -> Iterator[Event]:
        scoring = self._scores[request]
        for output in _outputs(scoring.handle):
            scoring.values += output.generated_log_probs
        if len(scoring.values) > scoring.length:
            del self._scores[request]
            yield ["score", request, scoring.values[: scoring.length]]
        elif failure := self._failure(scoring.handle):
            del self._scores[request]
            yield ["fail", request, failure]

    def _failure(self, handle: Any) -> str | None:
        if handle.get_status() == self._genai.GenerationStatus.IGNORED:
            return "its keys and values do not fit in the cache"
        return None


def _outputs(handle: Any) -> Iterator[Any]:
    while handle.can_read():
        yield from handle.read().values()


def main() -> None:
    """Serve until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print must not get between the events
        worker = Worker(json.loads(sys.argv[1]))

        def tell(events: list[Event]) -> None:
            if events:
                out.write(json.dumps(events) + "\n")
                out.flush()

        tell([["ready"]])
        commands: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(commands,), daemon=True).start()
        while True:
            while not (commands.empty() and worker.busy):
                command = commands.get()
                if command is None:
                    return
                tell(list(worker.run_command(command)))
            tell(list(worker.step()))


def _listen(commands: queue.SimpleQueue[list[Any] | None]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # before the pipelines' destructors have the last word there
    os._exit(0)  # they have nothing to save, and take seconds
