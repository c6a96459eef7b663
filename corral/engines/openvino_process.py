"""The child process in which OpenVINO GenAI computes: commands as JSON lines on standard input, events on standard output.

It is a process because each `step()` of OpenVINO holds Python's lock for up to half a second. n choices of one prompt are n
requests to OpenVINO, so that each streams, stops and is cancelled by itself; the others wait until the first has computed the
prompt, and then take it from the prefix cache. A choice starts once the key-value cache has room for its full length: if the
cache ran out of room, OpenVINO would take blocks back from a running choice, and choices that share a prefix with it would
silently go on with wrong keys and values (as of 2026.4.1). Scores come from a second pipeline, made for the first score,
without a prefix cache: a cached prompt has no log-probabilities.

Commands: `["submit", id, ids, sampling, seeds]`, `["score", id, ids]`, `["cancel", id, choice]`. Each step writes one line, a
list of events: `["delta", id, choice, ids, log-probs or null, finish or null]`, `["score", id, log-probs]` or
`["fail", id, reason]`. `["ping"]` is answered between two steps with `["pong"]`, which shows that steps end.
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
from typing import Any

from corral.engines.child_process import Event

BLOCK_TOKENS = 32
"""Tokens in a block of OpenVINO's key-value cache on a CPU; shorter prompts are not shared."""
STEP_TOKENS = 512
"""Most tokens that one step computes, besides scores; a longer prompt takes several."""
SCORE_TOKENS = 256
"""Tokens per forward pass of scores, whose logits, [tokens, vocabulary], are all in memory."""


@dataclass
class _Prompt:
    """The prompt of one request, which its choices share."""

    ids: list[int]
    stop_ids: frozenset[int]
    logprobs: bool
    blocks: int
    """Of the key-value cache, for a choice of full length."""
    ready: bool
    """It is computed, or too short to be shared: no choice must wait for another."""
    leader: int | None = None
    """The choice that computes the prompt."""


@dataclass
class _Choice:
    prompt: _Prompt
    config: Any
    handle: Any = None
    """OpenVINO's, once it has started."""


@dataclass
class _Scoring:
    length: int
    handle: Any
    values: list[float] = field(default_factory=list[float])


class Worker:
    """The pipelines and the requests under way in them.

    Args:
        settings: `folder`, `properties` (of OpenVINO), `blocks` and `score_blocks` (of the key-value cache).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino_genai

        self._genai: Any = openvino_genai
        self._settings = settings
        self._generating: Any = self._pipeline(settings["blocks"], STEP_TOKENS, prefixes=True)
        self._scoring: Any = None
        self._waiting: dict[tuple[int, int], _Choice] = {}
        """Choices that wait, the oldest request first; by (request, choice)."""
        self._running: dict[tuple[int, int], _Choice] = {}
        """Choices that have started."""
        self._blocks_to_free = 0
        """Of cancelled choices: OpenVINO frees them in the next step."""
        self._scores: dict[int, _Scoring] = {}
        self._last_id = 0

    def _pipeline(self, blocks: int, tokens: int, *, prefixes: bool) -> Any:
        config = self._genai.SchedulerConfig()
        config.num_kv_blocks = blocks
        config.enable_prefix_caching = prefixes
        config.max_num_batched_tokens = tokens
        settings = self._settings
        return self._genai.ContinuousBatchingPipeline(settings["folder"], config, "CPU", settings["properties"])

    @property
    def busy(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._waiting or self._running or self._blocks_to_free or self._scores)

    def run_command(self, command: list[Any]) -> Iterator[Event]:
        """Take a command. Yields an event if it fails."""
        name, request, *rest = command
        try:
            if name == "submit":
                self._submit(request, *rest)
            elif name == "score":
                self._score(request, *rest)
            else:
                self._cancel(request, *rest)
        except Exception as error:  # one bad request must not end the others
            yield ["fail", request, f"{type(error).__name__}: {error}"]

    def _submit(self, request: int, ids: list[int], sampling: dict[str, Any], seeds: list[int]) -> None:
        stop_ids = frozenset(sampling["stop_ids"])
        blocks = -(-(len(ids) + sampling["max_tokens"]) // BLOCK_TOKENS) + 1  # one to grow into
        prompt = _Prompt(ids, stop_ids, sampling["logprobs"], blocks, ready=len(ids) <= BLOCK_TOKENS)
        choices = [_Choice(prompt, self._config(sampling, seed)) for seed in seeds]
        self._waiting.update({(request, number): choice for number, choice in enumerate(choices)})

    def _admit(self) -> None:
        """Start the choices that need not wait for their prompt, as long as the cache has room."""
        free = self._settings["blocks"] - self._blocks_to_free - sum(c.prompt.blocks for c in self._running.values())
        for key, choice in list(self._waiting.items()):
            prompt = choice.prompt
            if prompt.blocks > free:
                return
            if prompt.ready or prompt.leader is None:
                prompt.leader = key[1]
                choice.handle = self._add(self._generating, prompt.ids, choice.config)
                self._running[key] = self._waiting.pop(key)
                free -= prompt.blocks

    def _score(self, request: int, ids: list[int]) -> None:
        if self._scoring is None:
            self._scoring = self._pipeline(self._settings["score_blocks"], SCORE_TOKENS, prefixes=False)
        config = self._genai.GenerationConfig(max_new_tokens=1, echo=True, logprobs=1, ignore_eos=True)
        config.set_eos_token_id(0)
        self._scores[request] = _Scoring(len(ids), self._add(self._scoring, ids, config))

    def _cancel(self, request: int, number: int | None) -> None:
        def cancelled(keys: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
            return [key for key in keys if key[0] == request and number in (None, key[1])]

        for key in cancelled(self._waiting):
            del self._waiting[key]
        for key in cancelled(self._running):
            choice = self._running.pop(key)
            choice.handle.cancel()
            self._blocks_to_free += choice.prompt.blocks
            if choice.prompt.leader == key[1]:
                choice.prompt.leader = None  # if it had not finished, the next choice computes the prompt
        if number is None and request in self._scores:
            self._scores.pop(request).handle.cancel()

    def _add(self, pipeline: Any, ids: list[int], config: Any) -> Any:
        import numpy as np
        import openvino as ov

        self._last_id += 1
        return pipeline.add_request(self._last_id, ov.Tensor(np.array([ids], dtype=np.int64)), config)

    def _config(self, sampling: dict[str, Any], seed: int) -> Any:
        config = self._genai.GenerationConfig(max_new_tokens=sampling["max_tokens"], logprobs=int(sampling["logprobs"]))
        stop_ids: list[int] = sampling["stop_ids"]
        config.stop_token_ids = set(stop_ids)
        config.set_eos_token_id(stop_ids[0] if stop_ids else 0)  # otherwise the folder's is used
        config.ignore_eos = not stop_ids
        if sampling["temperature"] > 0:
            config.do_sample = True
            config.temperature = sampling["temperature"]
            config.top_p = sampling["top_p"]
            config.rng_seed = seed
            if sampling["top_k"]:
                config.top_k = sampling["top_k"]
        return config

    def step(self) -> Iterator[Event]:
        """Compute one token of every running choice, and a part of the scores. Yields the events."""
        self._admit()
        if self._running or self._blocks_to_free:
            self._generating.step()
            self._blocks_to_free = 0
            for request, choice in list(self._running):
                yield from self._choice_events(request, choice)
        if self._scores:
            self._scoring.step()
            for request in list(self._scores):
                yield from self._score_events(request)

    def _choice_events(self, request: int, number: int) -> Iterator[Event]:
        choice = self._running[request, number]
        ids: list[int] = []
        logprobs: list[float] = []
        finish: str | None = None
        for output in _outputs(choice.handle):
            ids += output.generated_ids
            logprobs += output.generated_log_probs
            if output.finish_reason != self._genai.GenerationFinishReason.NONE:
                finish = "stop" if ids and ids[-1] in choice.prompt.stop_ids else "length"
        if finish == "stop":
            ids.pop()
            del logprobs[len(ids) :]
        failure = None if finish else self._failure(choice.handle)
        if finish or failure:
            del self._running[request, number]
        choice.prompt.ready |= bool(ids or finish or failure)
        if failure:
            yield ["fail", request, failure]
        elif ids or finish:
            yield ["delta", request, number, ids, logprobs if choice.prompt.logprobs else None, finish]

    def _score_events(self, request: int) -> Iterator[Event]:
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print must not mix with the events
        worker = Worker(json.loads(sys.argv[1]))

        def write(events: list[Event]) -> None:
            if events:
                out.write(json.dumps(events) + "\n")
                out.flush()

        write([["ready"]])
        commands: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(commands,), daemon=True).start()
        while True:
            while not (commands.empty() and worker.busy):
                command = commands.get()
                if command is None:
                    return
                write([["pong"]] if command == ["ping"] else list(worker.run_command(command)))
            write(list(worker.step()))


def _listen(commands: queue.SimpleQueue[list[Any] | None]) -> None:
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()  # the parent shows the last line, so the pipelines' destructors must not print after it
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # without the destructors, which take seconds and save nothing
