"""Conversation in, answer out: prompting, template, engine and consensus composed once, for evaluation, chat, batch and
serving alike.

It is async; `corral.answering.sync` gives the same to code that is not. Text is cut at stop strings here, since an engine
knows ids only. It does not know how ids become text (template), how ids are computed (engine), how examples are chosen
(prompting), how votes are counted (consensus), or what answers are for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from corral.answering.consensus import Candidate, Consensus, Vote
from corral.engines.base import Completion, Delta, Engine, Finish, Generation, Sampling
from corral.errors import RequestError
from corral.messages import Conversation
from corral.metrics import answer_extraction
from corral.prompting.few_shot import Prompting, after
from corral.template import Template
from corral.template.decoding import StopStringCutter, StreamDecoder

T = TypeVar("T")

# What takes longer than the way to a thread and back: about a millisecond of rendering.
_LONG_CHARACTERS = 4000
_CHARACTERS_OF_A_TURN = 50  # that take as long as the turn itself
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Token:
    """One drawn token of a text."""

    id: int
    data: bytes
    """What it adds to the text, perhaps part of a character; empty for a special token."""
    logprob: float
    """Natural log of its probability under the model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The choices for one prompt, as text and as ids."""

    texts: tuple[str, ...]
    completions: tuple[Completion, ...]
    """The ids that were drawn; with a stop string, up to the one that completed it, which the text leaves out."""
    prompt_tokens: int
    tokens: tuple[tuple[Token, ...], ...] = ()
    """With `Sampling.logprobs`, for each choice the tokens that its text begins with, in part or whole."""
    vote: Vote | None = None
    """With consensus, how the choice was made; choices that were not needed have the finish "cancelled"."""

    @property
    def chosen(self) -> int:
        """The place of the choice that is the answer: the vote's winner, else the first."""
        return self.vote.winner if self.vote else 0

    @property
    def text(self) -> str:
        """The answer."""
        return self.texts[self.chosen]

    @property
    def result(self) -> str:
        """What the answer comes to: what follows its last `Answer:` or the like, else its text."""
        return answer_extraction.final(self.text) or self.text


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice; the last one carries `finish`."""

    choice: int
    text: str
    finish: Finish | None = None
    tokens: tuple[Token, ...] = ()
    """With `Sampling.logprobs`, the tokens that begin in this text. Joined over a stream: `Answer.tokens`."""
    vote: Vote | None = None
    """With consensus, how the choice was made."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds the answers of a conversation."""

    nll: float
    """Negative log-likelihood in nats, summed over the trained tokens."""
    tokens: int


class Answerer:
    """A template over an engine, with a way to ask and a way to choose.

    Args:
        sampling: the default; the template's stop ids are added to it.
        prompting: what is shown before a question.
        consensus: with it, `answer` and `stream` draw several answers in one request and give the one that wins the vote;
            it takes the place of a sampling's n, temperature and top_p.
    """

    def __init__(
        self,
        engine: Engine,
        template: Template,
        sampling: Sampling | None = None,
        *,
        prompting: Prompting | None = None,
        consensus: Consensus | None = None,
    ) -> None:
        self.engine = engine
        self.template = template
        self.sampling = sampling or Sampling()
        self.prompting = prompting
        self.consensus = consensus
        # Its own: whatever else needs a thread is not to wait for long prompts. None is started before the first of them.
        self._threads = ThreadPoolExecutor(_THREADS, "corral-prompts")

    async def prompt(self, conversation: Conversation, sampling: Sampling | None = None) -> list[int]:
        """The ids that a conversation is asked with: examples and all, as many as leave room for the answer.

        Raises:
            TemplateError: the template refuses the conversation.
            AssetError: the model that finds similar examples cannot be had.
        """
        if self.prompting is None:
            return await self._rendered(conversation)
        room = self.engine.features.max_length - (sampling or self.sampling).max_tokens
        for shots in await self._shots(conversation):
            ids = await self._rendered(self.prompting.asked(conversation, shots))
            if len(ids) <= room:
                return ids
        return await self._rendered(self.prompting.asked(conversation, ()))

    async def aside(self, characters: int, call: Callable[..., T], *arguments: Any) -> T:
        """What a call returns that reads so many characters; a long one is made in a thread, as it would hold up those whose
        answers are on their way."""
        if characters <= _LONG_CHARACTERS:
            return call(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)

    async def _rendered(self, conversation: Conversation) -> list[int]:
        characters = conversation.characters + _CHARACTERS_OF_A_TURN * len(conversation.messages)
        return await self.aside(characters, self.template.prompt, conversation)

    def begin(self, ids: Sequence[int], sampling: Sampling | None = None, stop: Sequence[str] = ()) -> TextStream:
        """Ask for completions of a rendered prompt. Returns at once; must be called in a running event loop.

        Args:
            ids: of the prompt, from `template.prompt`.
            stop: strings that end a choice and are not part of its text. Of several, the one complete first counts, and
                of those complete at once the longest.

        Raises:
            EngineError: the engine refuses (too long, or a feature it lacks), or is closed.
        """
        if "" in stop:
            raise RequestError("a stop string is empty", hint="leave it out")
        sampling = self._sampling(sampling)
        return TextStream(self.engine.submit(ids, sampling), self.template, sampling, stop)

    async def answer(
        self, conversation: Conversation, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Answer:
        """Answer a conversation that ends with the user; `stop` as in `begin`.

        Raises:
            TemplateError: the template refuses the conversation.
            EngineError: the engine refuses or fails.
            AssetError: a model for embeddings cannot be had.
        """
        ids = await self.prompt(conversation, sampling)
        if self.consensus is None:
            return await self.begin(ids, sampling, stop).whole()
        return await self.begin(ids, self.several(sampling), stop).decided(self.consensus)

    async def stream(
        self, conversation: Conversation, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> AsyncIterator[TextDelta]:
        """The same as text arrives; with consensus, the winner once it is known. Leaving the iteration early cancels the work.

        Raises: as `answer`.
        """
        if self.consensus is not None:
            answer = await self.answer(conversation, sampling, stop)
            tokens = answer.tokens[answer.chosen] if answer.tokens else ()
            finish = answer.completions[answer.chosen].finish
            yield TextDelta(answer.chosen, answer.text, finish, tokens, answer.vote)
            return
        ids = await self.prompt(conversation, sampling)
        async with contextlib.aclosing(aiter(self.begin(ids, sampling, stop))) as deltas:
            async for delta in deltas:
                yield delta

    async def score(self, conversation: Conversation) -> Score:
        """How likely the model finds the answers of a conversation, after the examples of `prompting` if there is one.

        Raises: as `answer`.
        """
        encoded = self.template.encode(conversation)
        start = max(1, encoded.trained.index(True))
        roles = [message.role for message in conversation.messages]
        head = Conversation(conversation.messages[: roles.index("assistant")])
        for shots in await self._shots(conversation):
            longer = self.template.encode(after(shots, conversation))
            if len(longer.ids) <= self.engine.features.max_length:
                # The answers of examples are trained tokens too, but not what is asked about.
                encoded, start = longer, len(self.template.prompt(after(shots, head)))
                break
        logprobs = await self.engine.score(encoded.ids, start)
        trained = encoded.trained[start:]
        return Score(-sum(p for p, t in zip(logprobs, trained, strict=True) if t), sum(trained))

    def several(self, sampling: Sampling | None = None) -> Sampling:
        """How the answers to be voted on are drawn, otherwise like `sampling`. There must be a consensus."""
        assert self.consensus is not None
        return replace(
            sampling or self.sampling,
            n=self.consensus.n,
            temperature=self.consensus.temperature,
            top_p=self.consensus.top_p,
            logprobs=self.engine.features.logprobs,  # they break ties
        )

    async def _shots(self, conversation: Conversation) -> list[list[Conversation]]:
        """The examples for a conversation, then fewer and fewer, the most useful ones longest."""
        if self.prompting is None:
            return []
        # Finding similar ones is computing, which must not hold up those whose answers are on their way.
        shots = await asyncio.to_thread(self.prompting.shots, conversation)
        return [shots[left_out:] for left_out in range(len(shots))]

    def _sampling(self, sampling: Sampling | None) -> Sampling:
        sampling = sampling or self.sampling
        return replace(sampling, stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *self.template.stop_ids))))


class TextStream:
    """An answer under way, made by `Answerer.begin`: iterate over it (once), or await `whole`.

    Where that ends early (a break, an error, a cancelled task), the work is cancelled.
    """

    def __init__(self, generation: Generation, template: Template, sampling: Sampling, stop: Sequence[str]) -> None:
        self._generation = generation
        self._choices = [_Choice(i, template, sampling.logprobs, stop) for i in range(sampling.n)]
        self.prompt_tokens = generation.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens drawn so far for all choices, without stop ids; of a choice that a stop string ended, up to that one."""
        return sum(len(choice.ids) for choice in self._choices)

    async def __aiter__(self) -> AsyncGenerator[TextDelta, None]:
        async with contextlib.aclosing(aiter(self._generation)) as deltas:
            async for delta in deltas:
                choice = self._choices[delta.choice]
                if choice.finish is not None:
                    continue  # drawn before the engine heard of the stop string
                new = choice.take(delta)
                if choice.finish is not None and delta.finish is None:
                    self._generation.cancel(delta.choice)
                if new.text or new.finish:
                    yield new
                if all(c.finish is not None for c in self._choices):
                    return

    async def whole(self) -> Answer:
        """Wait for all choices. Raises: EngineError."""
        texts = [""] * len(self._choices)
        tokens: list[list[Token]] = [[] for _ in self._choices]
        async with contextlib.aclosing(aiter(self)) as deltas:
            async for delta in deltas:
                texts[delta.choice] += delta.text
                tokens[delta.choice] += delta.tokens
        return self._answer(texts, tokens)

    async def decided(self, consensus: Consensus) -> Answer:
        """Wait until a vote among the choices is decided; those not needed are cancelled. Raises: EngineError."""
        ballot = consensus.ballot(len(self._choices))
        texts = [""] * len(self._choices)
        tokens: list[list[Token]] = [[] for _ in self._choices]
        async with contextlib.aclosing(aiter(self)) as deltas:
            async for delta in deltas:
                texts[delta.choice] += delta.text
                tokens[delta.choice] += delta.tokens
                if delta.finish is not None:
                    logprobs = self._choices[delta.choice].logprobs
                    mean = sum(logprobs) / len(logprobs) if logprobs else None
                    ballot.add(delta.choice, Candidate(texts[delta.choice], mean))
                    if ballot.decided:
                        break
        # A vote by embeddings computes.
        return replace(self._answer(texts, tokens), vote=await asyncio.to_thread(ballot.vote))

    def cancel(self) -> None:
        """Stop the work, also where the iteration never began."""
        self._generation.cancel()

    def _answer(self, texts: Sequence[str], tokens: Sequence[Sequence[Token]]) -> Answer:
        return Answer(
            tuple(texts),
            tuple(c.completion() for c in self._choices),
            self.prompt_tokens,
            tuple(map(tuple, tokens)) if any(c.wants_tokens for c in self._choices) else (),
        )


class _Choice:
    """One choice on its way from ids to text."""

    def __init__(self, index: int, template: Template, wants_tokens: bool, stop: Sequence[str]) -> None:
        self.wants_tokens = wants_tokens
        self.ids: list[int] = []
        self.logprobs: list[float] | None = [] if wants_tokens else None
        self.finish: Finish | None = None
        self._index = index
        self._bytes = template.token_bytes
        self._decoder = StreamDecoder(self._bytes)
        self._cutter = StopStringCutter(stop)
        self._decoded = 0
        """Characters, with those that are held back."""
        self._given = 0
        """Characters in the deltas so far."""
        self._waiting: list[tuple[int, Token]] = []
        """Tokens that no delta carried yet, and the character each begins at."""

    def take(self, delta: Delta) -> TextDelta:
        """The text that new ids complete."""
        text = ""
        logprobs = delta.logprobs or ()
        for place, id_ in enumerate(delta.ids):
            self.ids.append(id_)
            if self.logprobs is not None:
                self.logprobs.append(logprobs[place])
                self._waiting.append((self._decoded, Token(id_, self._bytes[id_], logprobs[place])))
            text += self._new(self._decoder.push((id_,)))
            if self._cutter.stopped:
                break
        if delta.finish is not None and not self._cutter.stopped:
            text += self._new(self._decoder.finish())
        self.finish = "stop" if self._cutter.stopped else delta.finish
        is_end = self.finish is not None and not self._cutter.stopped
        if is_end:
            text += self._cutter.finish()
        self._given += len(text)
        count = sum(is_end or start < self._given for start, _ in self._waiting)
        tokens = tuple(token for _, token in self._waiting[:count])
        del self._waiting[:count]
        return TextDelta(self._index, text, self.finish, tokens)

    def completion(self) -> Completion:
        """All that was drawn."""
        return Completion(
            tuple(self.ids), None if self.logprobs is None else tuple(self.logprobs), self.finish or "cancelled"
        )

    def _new(self, text: str) -> str:
        self._decoded += len(text)
        return self._cutter.push(text)
