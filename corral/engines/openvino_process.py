"""The child process in which OpenVINO GenAI computes: commands as JSON lines on standard input, events on standard output.

It is a process because each `step()` of OpenVINO holds Python's lock for up to half a second. n choices of one prompt are n
requests to OpenVINO, so that each streams, stops and is cancelled by itself; the others wait until the first has computed the
prompt, and then take it from the prefix cache. A choice starts once the key-value cache has room for its full length: if the
cache ran out of room, OpenVINO would take blocks back from a running choice, and choices that share a prefix with it would
silently go on with wrong keys and values (as of 2026.4.1). Given ids are scored by `openvino_scoring`; so are the ids of a
choice whose most likely ids are requested, once it has ended, and until then none of them is passed on. Requests with a field
of STEPWISE are computed by `openvino_stepping`.

Commands: `["submit", id, ids, sampling, seeds]`, `["score", id, ids, start, top]`, `["cancel", id, choice]`. Each step writes
one line, a list of events: `["delta", id, choice, ids, log-probs or null, finish or null, tops or null]`, `["score", id,
log-probs, tops, whether it is done]` or `["fail", id, reason]`. Tops are, for each id, the most likely (id, log-prob).
`["ping"]` is answered between two steps with `["pong"]`, which shows that steps end.
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
from pathlib import Path
from typing import Any

from corral.engines.base import Sampling
from corral.engines.child_process import Event
from corral.engines.openvino_inference import PART_TOKENS, Model
from corral.engines.openvino_scoring import Scorer, Text
from corral.engines.openvino_stepping import AT_ONCE, Stepper

STEPWISE = ("logit_bias", "frequency_penalty", "presence_penalty")
"""Fields of Sampling that GenAI has not, or not right."""

BLOCK_TOKENS = 32
"""Tokens in a block of OpenVINO's key-value cache on a CPU; shorter prompts are not shared."""
_LEAST = 1e-6  # temperature and top-p
_BATCHED_TOKENS = 512  # by GenAI in one step; a longer prompt takes several
STEP_TOKENS = _BATCHED_TOKENS + (1 + AT_ONCE) * PART_TOKENS
"""Most tokens that one step computes: a batch, scores, and parts of the prompts that GenAI does not compute."""


@dataclass
class _Prompt:
    """The prompt of one request, which its choices share."""

    ids: list[int]
    stop_ids: frozenset[int]
    logprobs: bool
    top: int
    """How many of the most likely ids are wanted with each id."""
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
    held: list[int] = field(default_factory=list[int])
    """Ids that are not passed on before they are scored."""


class Worker:
    """The pipelines and the requests under way in them.

    Args:
        settings: `folder`, `properties` (of OpenVINO), `vocabulary` and `blocks` (of the key-value cache).
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        import openvino_genai

        self._genai: Any = openvino_genai
        self._settings = settings
        self._generating: Any = self._pipeline()
        model = Model(Path(settings["folder"]), settings["properties"], settings["vocabulary"])
        self._scorer, self._stepper = Scorer(model), Stepper(model)
        self._waiting: dict[tuple[int, int], _Choice] = {}
        """Choices that wait, the oldest request first; by (request, choice)."""
        self._running: dict[tuple[int, int], _Choice] = {}
        """Choices that have started."""
        self._blocks_to_free = 0
        """Of cancelled choices: OpenVINO frees them in the next step."""
        self._ended: dict[tuple[int, int], tuple[_Choice, str]] = {}
        """Choices that are being scored, and why they ended."""
        self._last_id = 0

    def _pipeline(self) -> Any:
        config = self._genai.SchedulerConfig()
        config.num_kv_blocks = self._settings["blocks"]
        config.enable_prefix_caching = True
        config.max_num_batched_tokens = _BATCHED_TOKENS
        settings = self._settings
        return self._genai.ContinuousBatchingPipeline(settings["folder"], config, "CPU", settings["properties"])

    @property
    def busy(self) -> bool:
        """Whether a step has something to compute."""
        return bool(self._waiting or self._running or self._blocks_to_free or self._scorer.busy or self._stepper.busy)

    def run_command(self, command: list[Any]) -> Iterator[Event]:
        """Take a command. Yields an event if it fails."""
        name, request, *rest = command
        try:
            if name == "submit":
                self._submit(request, *rest)
            elif name == "score":
                self._scorer.add((request, None), Text(*rest))
            else:
                self._cancel(request, *rest)
        except Exception as error:  # one bad request must not end the others
            yield ["fail", request, f"{type(error).__name__}: {error}"]

    def _submit(self, request: int, ids: list[int], sampling: dict[str, Any], seeds: list[int]) -> None:
        if any(sampling[name] for name in STEPWISE):
            for number, seed in enumerate(seeds):
                self._stepper.add((request, number), ids, Sampling(**sampling), seed)
            return
        stop_ids = frozenset(sampling["stop_ids"])
        blocks = -(-(len(ids) + sampling["max_tokens"]) // BLOCK_TOKENS) + 1  # one to grow into
        ready = len(ids) <= BLOCK_TOKENS
        prompt = _Prompt(ids, stop_ids, sampling["logprobs"], sampling["top_logprobs"], blocks, ready)
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
                choice.handle = self._add(prompt.ids, choice.config)
                self._running[key] = self._waiting.pop(key)
                free -= prompt.blocks

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
        self._scorer.cancel(request, number)
        self._stepper.cancel(request, number)
        for key in cancelled(list(self._ended)):
            del self._ended[key]

    def _add(self, ids: list[int], config: Any) -> Any:
        import numpy as np
        import openvino as ov

        self._last_id += 1
        return self._generating.add_request(self._last_id, ov.Tensor(np.array([ids], dtype=np.int64)), config)

    def _config(self, sampling: dict[str, Any], seed: int) -> Any:
        config = self._genai.GenerationConfig(max_new_tokens=sampling["max_tokens"], logprobs=int(sampling["logprobs"]))
        stop_ids: list[int] = sampling["stop_ids"]
        config.stop_token_ids = set(stop_ids)
        config.set_eos_token_id(stop_ids[0] if stop_ids else 0)  # otherwise the folder's is used
        config.ignore_eos = not stop_ids
        config.min_new_tokens = sampling["min_tokens"] if stop_ids else 0
        config.repetition_penalty = sampling["repetition_penalty"]
        if (
            sampling["temperature"] > 0 and sampling["min_p"] < 1
        ):  # OpenVINO refuses 1, which leaves the most likely id only
            config.do_sample = True
            # Lower ones become 0 in its 32-bit floats; as low as this they leave the most likely id.
            config.temperature = max(sampling["temperature"], _LEAST)
            config.top_p = max(sampling["top_p"], _LEAST)
            config.min_p = sampling["min_p"]
            config.rng_seed = seed
            if sampling["top_k"]:
                config.top_k = sampling["top_k"]
        config.validate()  # here a fault ends this request, in a step it would end the process
        return config

    def step(self) -> Iterator[Event]:
        """Compute one token of every running choice, and a part of the scores. Yields the events."""
        self._admit()
        if self._running or self._blocks_to_free:
            self._generating.step()
            self._blocks_to_free = 0
            for request, choice in list(self._running):
                yield from self._choice_events(request, choice)
        for (request, number), step in self._stepper.step():
            if step.failure:
                yield ["fail", request, step.failure]
            else:
                yield ["delta", request, number, step.ids, step.logprobs, step.finish, step.tops]
        for (request, number), part, is_last in self._scorer.step():
            if part.failure:
                yield ["fail", request, part.failure]
            elif number is None:
                yield ["score", request, part.logprobs, part.tops, is_last]
            else:
                choice, finish = self._ended[request, number]
                count = len(part.logprobs)
                ids, choice.held = choice.held[:count], choice.held[count:]
                if is_last:
                    del self._ended[request, number]
                if ids:
                    yield ["delta", request, number, ids, part.logprobs, finish if is_last else None, part.tops]

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
        if choice.prompt.top:
            choice.held += ids
            ids = []
        if failure:
            yield ["fail", request, failure]
        elif choice.held and finish:
            self._ended[request, number] = choice, finish
            prompt = choice.prompt
            self._scorer.add((request, number), Text(prompt.ids + choice.held, len(prompt.ids), prompt.top))
        elif ids or finish:
            yield ["delta", request, number, ids, logprobs if choice.prompt.logprobs else None, finish, None]

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
