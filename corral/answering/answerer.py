"""Conversation in, answer out: an Answerer composes prompting, template, engine and consensus.

Evaluation, chat, batch and serving all use it. It is async; `corral.answering.sync` wraps it for other code. Stop strings are
cut here, because an engine knows token ids only.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from corral.answering.consensus import Candidate, Consensus, Vote
from corral.engines.base import Alternatives, Completion, Delta, Engine, Finish, Generation, Sampling
from corral.errors import RequestError
from corral.messages import Conversation
from corral.metrics import answer_extraction
from corral.prompting.few_shot import Prompting, insert_examples
from corral.prompting.prompt import Prompt
from corral.template import Encoded, Template
from corral.template.decoding import StopStringCutter, StreamDecoder

T = TypeVar("T")

# Longer prompts are rendered in a thread: that takes about a millisecond, more than handing the work over.
_INLINE_CHARACTERS = 4000
_CHARACTERS_PER_MESSAGE = 50  # rendering a message costs about as much as so many characters
_THREADS = 2


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token."""

    id: int
    data: bytes
    """The bytes it adds to the text, perhaps part of a character; empty for a special token."""
    logprob: float
    """Natural log of its probability under the model."""
    top: Alternatives = ()
    """With `Sampling.top_logprobs`: the most likely ids at its place."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The choices for one prompt, as text and as ids."""

    texts: tuple[str, ...]
    completions: tuple[Completion, ...]
    """The generated ids. With a stop string they end with the id that completed it; the text ends before it."""
    prompt: Prompt
    """What was asked, with the examples and passages that were shown."""
    prompt_tokens: int
    """As the engine counted them."""
    tokens: tuple[tuple[Token, ...], ...] = ()
    """With `Sampling.logprobs`: for each choice, the tokens that begin within its text."""
    vote: Vote | None = None
    """With consensus: how the choice was made. Choices that were not needed have the finish "cancelled"."""

    @property
    def winner(self) -> int:
        """Index of the choice that is the answer: the winner of the vote, else the first."""
        return self.vote.winner if self.vote else 0

    @property
    def text(self) -> str:
        """The text of the winning choice."""
        return self.texts[self.winner]

    @property
    def finish(self) -> Finish:
        """Why the winning choice ended."""
        return self.completions[self.winner].finish

    @property
    def result(self) -> str:
        """What follows the last `Answer:` or a similar marker in the text; without a marker, the whole text."""
        return answer_extraction.marked_text(self.text) or self.text

    @property
    def completion_tokens(self) -> int:
        """Tokens generated for all choices together."""
        return sum(len(completion.ids) for completion in self.completions)

    def vote_fields(self) -> dict[str, Any]:
        """The vote as JSON fields, for rows that are kept; empty without a vote.

        Returns: lists with an entry for each choice: `candidates` (texts, partial if cancelled), `finishes`, `votes` (scores;
        None if cancelled) and, where results were counted, `results` (None if there is none); and `winner`, an index.
        """
        if self.vote is None:
            return {}
        fields: dict[str, Any] = {
            "candidates": list(self.texts),
            "finishes": [completion.finish for completion in self.completions],
            "votes": list(self.vote.scores),
        }
        if any(result is not None for result in self.vote.results):
            fields["results"] = list(self.vote.results)
        return fields | {"winner": self.vote.winner}


@dataclass(frozen=True, slots=True)
class TextDelta:
    """New text of one choice; its last delta carries `finish`."""

    choice: int
    text: str
    finish: Finish | None = None
    tokens: tuple[Token, ...] = ()
    """With `Sampling.logprobs`: the tokens that begin in this text. Over a whole stream they add up to `Answer.tokens`."""
    vote: Vote | None = None
    """With consensus: how the choice was made."""


@dataclass(frozen=True, slots=True)
class Score:
    """The likelihood of a conversation's answers under a model."""

    nll: float
    """Negative log-likelihood in nats, summed over the trained tokens."""
    tokens: int


class Answerer:
    """Answers conversations with an engine and a template.

    Args:
        sampling: the default; the template's stop ids are added to it.
        prompting: adds examples and instructions to a question.
        consensus: with it, `answer` and `stream` draw several answers in one request and return the winner of a vote. Its n,
            temperature and top_p replace those of the sampling.
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
        # An executor of its own, so that other work in threads does not wait for long prompts. Threads start when needed.
        self._executor = ThreadPoolExecutor(_THREADS, "corral-prompts")

    async def encode_prompt(self, conversation: Conversation, sampling: Sampling | None = None) -> Prompt:
        """The prompt of a conversation, with as many examples as leave room in the context for the answer.

        A conversation that ends with an answer is continued: what is generated follows its text.

        Raises:
            TemplateError: the template refuses the conversation.
            AssetError: the embedding model that finds similar examples cannot be loaded.
        """
        prompting = self.prompting
        if prompting is None:
            return Prompt(await self._encode(conversation))
        max_prompt = self.engine.features.max_length - (sampling or self.sampling).max_tokens
        asked, begun = conversation, ()
        if conversation.answered:
            asked, begun = Conversation(conversation.messages[:-1]), conversation.messages[-1:]

        def apply(examples: Sequence[Conversation]) -> Conversation:
            return Conversation((*prompting.apply(asked, examples).messages, *begun))

        examples, ids = await self._encode_with_examples(
            asked,
            lambda examples: self._encode(apply(examples)),
            lambda ids: len(ids) <= max_prompt,
        )
        return Prompt(ids, tuple(examples))

    async def run_in_thread_if_long(self, characters: int, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function that processes so many characters: a long call runs in a thread, so as not to block the loop."""
        if characters <= _INLINE_CHARACTERS:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def _encode(self, conversation: Conversation) -> list[int]:
        characters = conversation.characters + _CHARACTERS_PER_MESSAGE * len(conversation.messages)
        encode = self.template.continuation if conversation.answered else self.template.prompt
        return await self.run_in_thread_if_long(characters, encode, conversation)

    def start(self, prompt: Prompt, sampling: Sampling | None = None, stop: Sequence[str] = ()) -> TextStream:
        """Request completions of a prompt. Returns at once; must be called in a running event loop.

        Args:
            prompt: from `encode_prompt`.
            stop: strings that end a choice and are not part of its text. The string that is complete first ends it; of
                several complete at once, the longest.

        Raises:
            EngineError: the engine refuses (too long, or a feature it lacks), or is closed.
        """
        if "" in stop:
            raise RequestError("a stop string is empty", hint="leave it out")
        sampling = self._with_stop_ids(sampling)
        return TextStream(self.engine.submit(prompt.ids, sampling), prompt, self.template, sampling, stop)

    async def answer(
        self, conversation: Conversation, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Answer:
        """Answer a conversation that ends with a user message; `stop` as in `start`.

        Raises:
            TemplateError: the template refuses the conversation.
            EngineError: the engine refuses or fails.
            AssetError: an embedding model cannot be loaded.
        """
        prompt = await self.encode_prompt(conversation, sampling)
        if self.consensus is not None:
            sampling = self.vote_sampling(sampling)
        return await self.start(prompt, sampling, stop).collect(self.consensus)

    async def stream(
        self, conversation: Conversation, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> AsyncIterator[TextDelta]:
        """Like `answer`, as text arrives; with consensus, the winner once it is known. Leaving the iteration cancels the work.

        Raises: as `answer`.
        """
        if self.consensus is not None:
            answer = await self.answer(conversation, sampling, stop)
            tokens = answer.tokens[answer.winner] if answer.tokens else ()
            yield TextDelta(answer.winner, answer.text, answer.finish, tokens, answer.vote)
            return
        prompt = await self.encode_prompt(conversation, sampling)
        async with contextlib.aclosing(aiter(self.start(prompt, sampling, stop))) as deltas:
            async for delta in deltas:
                yield delta

    async def score(self, conversation: Conversation) -> Score:
        """The likelihood of a conversation's answers, with the examples of `prompting` before it if there is one.

        Raises: as `answer`.
        """

        async def encode(examples: Sequence[Conversation]) -> Encoded:
            return self.template.encode(insert_examples(examples, conversation))

        examples, encoded = await self._encode_with_examples(
            conversation, encode, lambda encoded: len(encoded.ids) <= self.engine.features.max_length
        )
        start = 0
        if examples:  # their answers are trained tokens as well, but are not scored
            roles = [message.role for message in conversation.messages]
            head = Conversation(conversation.messages[: roles.index("assistant")])
            start = len(self.template.prompt(insert_examples(examples, head)))
        return await self.score_encoded(encoded, start)

    async def score_encoded(self, encoded: Encoded, start: int = 0) -> Score:
        """The likelihood of the trained tokens of a sequence from `start` on; the first of a sequence has none.

        Raises: EngineError (the engine cannot score, or the sequence is too long).
        """
        start = max(1, start, encoded.trained.index(True))
        logprobs = await self.engine.score(encoded.ids, start)
        trained = encoded.trained[start:]
        return Score(-sum(p for p, t in zip(logprobs, trained, strict=True) if t), sum(trained))

    def vote_sampling(self, sampling: Sampling | None = None) -> Sampling:
        """The sampling of the candidates of a vote: `sampling` with the settings of the consensus, which must exist."""
        assert self.consensus is not None
        return replace(
            sampling or self.sampling,
            n=self.consensus.n,
            temperature=self.consensus.temperature,
            top_p=self.consensus.top_p,
            logprobs=self.engine.features.logprobs,  # they break ties
        )

    async def _encode_with_examples(
        self,
        conversation: Conversation,
        encode: Callable[[Sequence[Conversation]], Awaitable[T]],
        fits: Callable[[T], bool],
    ) -> tuple[Sequence[Conversation], T]:
        """As many examples of `prompting` as fit, and what `encode` makes of them; fewer are tried until they fit."""
        if self.prompting is not None:
            # Choosing similar examples computes embeddings: in a thread, so as not to block the loop.
            for examples in await asyncio.to_thread(self.prompting.example_sets, conversation):
                encoding = await encode(examples)
                if fits(encoding):
                    return examples, encoding
        return (), await encode(())

    def _with_stop_ids(self, sampling: Sampling | None) -> Sampling:
        sampling = sampling or self.sampling
        return replace(sampling, stop_ids=tuple(dict.fromkeys((*sampling.stop_ids, *self.template.stop_ids))))


class TextStream:
    """An answer being generated, made by `Answerer.start`: iterate over it (once), or await `collect`.

    If either ends early (a break, an error, a cancelled task), the work is cancelled.
    """

    def __init__(
        self, generation: Generation, prompt: Prompt, template: Template, sampling: Sampling, stop: Sequence[str]
    ) -> None:
        self._generation = generation
        self.prompt = prompt
        self._choices = [_ChoiceDecoder(i, template, sampling.logprobs, stop) for i in range(sampling.n)]
        self.prompt_tokens = generation.prompt_tokens

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far for all choices, without stop ids; after a stop string none are counted."""
        return sum(len(choice.ids) for choice in self._choices)

    async def __aiter__(self) -> AsyncGenerator[TextDelta, None]:
        async with contextlib.aclosing(aiter(self._generation)) as deltas:
            async for delta in deltas:
                choice = self._choices[delta.choice]
                if choice.finish is not None:
                    continue  # generated before the engine heard of the stop string
                decoded = choice.push(delta)
                if choice.finish is not None and delta.finish is None:
                    self._generation.cancel(delta.choice)
                if decoded.text or decoded.finish:
                    yield decoded
                if all(c.finish is not None for c in self._choices):
                    return

    async def collect(self, consensus: Consensus | None = None) -> Answer:
        """Wait for all choices; with consensus, until a vote among them is decided, and cancel the rest.

        Raises: EngineError.
        """
        ballot = consensus.new_ballot(len(self._choices)) if consensus else None
        texts = [""] * len(self._choices)
        tokens: list[list[Token]] = [[] for _ in self._choices]
        async with contextlib.aclosing(aiter(self)) as deltas:
            async for delta in deltas:
                texts[delta.choice] += delta.text
                tokens[delta.choice] += delta.tokens
                if ballot is not None and delta.finish is not None:
                    logprobs = self._choices[delta.choice].logprobs
                    mean = sum(logprobs) / len(logprobs) if logprobs else None
                    # Votes read whole answers and compare them: in a thread, so as not to block the loop.
                    if await asyncio.to_thread(ballot.add, delta.choice, Candidate(texts[delta.choice], mean)):
                        break
        return Answer(
            tuple(texts),
            tuple(choice.completion() for choice in self._choices),
            self.prompt,
            self.prompt_tokens,
            tuple(map(tuple, tokens)) if any(choice.wants_tokens for choice in self._choices) else (),
            await asyncio.to_thread(ballot.vote) if ballot is not None else None,
        )

    def cancel(self) -> None:
        """Stop the work, also if the iteration never began."""
        self._generation.cancel()


class _ChoiceDecoder:
    """Turns the ids of one choice into text."""

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
        """Characters decoded, including those held back."""
        self._emitted = 0
        """Characters in the deltas so far."""
        self._pending: list[tuple[int, Token]] = []
        """Tokens that no delta has carried yet, each with the position of its first character."""

    def push(self, delta: Delta) -> TextDelta:
        """The text that new ids complete."""
        text = ""
        logprobs = delta.logprobs or ()
        tops = delta.top_logprobs or ((),) * len(delta.ids)
        for position, id_ in enumerate(delta.ids):
            self.ids.append(id_)
            if self.logprobs is not None:
                self.logprobs.append(logprobs[position])
                token = Token(id_, self._bytes[id_], logprobs[position], tops[position])
                self._pending.append((self._decoded, token))
            text += self._cut(self._decoder.push((id_,)))
            if self._cutter.stopped:
                break
        if delta.finish is not None and not self._cutter.stopped:
            text += self._cut(self._decoder.finish())
        self.finish = "stop" if self._cutter.stopped else delta.finish
        is_end = self.finish is not None and not self._cutter.stopped
        if is_end:
            text += self._cutter.finish()
        self._emitted += len(text)
        count = sum(is_end or start < self._emitted for start, _ in self._pending)
        tokens = tuple(token for _, token in self._pending[:count])
        del self._pending[:count]
        return TextDelta(self._index, text, self.finish, tokens)

    def completion(self) -> Completion:
        """All ids so far; `cancelled` if the choice has not ended."""
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        return Completion(tuple(self.ids), logprobs, self.finish or "cancelled")

    def _cut(self, text: str) -> str:
        self._decoded += len(text)
        return self._cutter.push(text)
