"""The request of a text completion, and its choices, built from the engine's ids: text, token ids and log-probabilities."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from corral.engines.base import MAX_ALTERNATIVES, Alternatives, Delta, Finish, TokenScore
from corral.serving.generation import IMPOSSIBLE_LOGPROB, finish_reason
from corral.serving.protocol import (
    DEFAULT_LIMITS,
    GenerationRequest,
    Length,
    Usage,
    json_list,
    json_with,
    texts_or_ids,
)
from corral.template import Template
from corral.template.decoding import StopStringCutter


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`.

    Extensions, named as vLLM's: `return_token_ids`, `return_tokens_as_token_ids`, `ignore_eos`, `add_special_tokens`, and
    those of every request.
    """

    prompt: Annotated[Any, texts_or_ids(DEFAULT_LIMITS.prompts)]
    max_tokens: Length = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    best_of: int | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Names tokens by their ids, as in `token_id:5`, in `logprobs`: several ids may have the same text."""
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None

    only: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationRequest.only,
        "suffix": ("",),
        "skip_special_tokens": (True,),
    }
    why: ClassVar[Mapping[str, str]] = {
        **GenerationRequest.why,
        "suffix": "chat models were not trained to fill in the middle",
    }

    @property
    def top_logprob_count(self) -> int:  # noqa: D102 (see GenerationRequest)
        return self.logprobs or 0

    @property
    def wants_logprobs(self) -> bool:  # noqa: D102
        return self.logprobs is not None


class TextLogprobs(BaseModel):
    """The tokens of a choice, one entry each. A token that is not valid UTF-8 is written as `bytes:\\xe2\\x80`."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    """null for the first token of a prompt; -9999 for a token of probability 0."""
    top_logprobs: list[dict[str, float] | None] | None = None
    """With `logprobs: N` over 0, for each position: the token itself and the N most likely ones; null where they are not
    known, as for the first token of a prompt."""
    text_offset: list[int] = []
    """Where each token begins in the text, in characters."""


class TextChoice(BaseModel):
    """A continuation, or in a stream the new part of one."""

    index: int
    """Numbers the choices of the first prompt, then those of the second, and so on."""
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: list[int] | None = None
    """The generated ids, with `return_token_ids`."""
    prompt_token_ids: list[int] | None = None
    """With `return_token_ids`; in a stream, in the first chunk of each choice."""


class TextCompletion(BaseModel):
    """A response, or a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None
    choices: list[TextChoice]
    usage: Usage | None = None


class ChoiceBuilder:
    """Builds one choice from the engine's ids.

    Args:
        prompt: its ids.
        shown_stop_ids: ids that end the choice and are shown with their log-probability.
        is_greedy: whether each generated id is the model's most likely one.
    """

    def __init__(
        self,
        index: int,
        template: Template,
        request: CompletionRequest,
        prompt: Sequence[int],
        shown_stop_ids: Sequence[int],
        is_greedy: bool,
    ) -> None:
        self.finish: Finish | None = None
        self.token_count = 0
        """Generated tokens, without an end token."""
        self._index = index
        self._request = request
        self._shown_stop_ids = shown_stop_ids
        self._template = template
        self._is_greedy = is_greedy
        self._cutter = StopStringCutter(request.stops)
        # The decoder starts after the prompt, which may end within a character, and keeps the space of a first word.
        self._decoder = self._template.stream_decoder()
        if not request.echo:
            self._decoder.push(prompt)
        self._offset = 0
        """Characters so far, for `text_offset`."""

    def prompt_part(
        self, prompt: str | list[int], ids: Sequence[int], scores: Sequence[TokenScore | None]
    ) -> TextChoice:
        """The part that describes the prompt: its text, log-probabilities and ids, as far as they were requested."""
        text = ""
        logprobs = TextLogprobs()
        if self._request.echo:
            for position, id_ in enumerate(ids):
                if scores:
                    self._add_logprob(logprobs, id_, scores[position])
                new = self._decoder.push((id_,))
                self._offset += len(new)
                text += new
        ends_here = self._request.max_tokens == 0
        with_ids = self._request.return_token_ids
        return TextChoice(
            index=self._index,
            text=prompt if self._request.echo and isinstance(prompt, str) else text,
            logprobs=self._requested_logprobs(logprobs),
            finish_reason="length" if ends_here else None,
            token_ids=[] if with_ids else None,
            prompt_token_ids=list(ids) if with_ids else None,
        )

    def add(self, delta: Delta) -> TextChoice:
        """The part for new ids. Raises: Refused (the engine cancelled the choice)."""
        text = ""
        logprobs = TextLogprobs()
        ids: list[int] = []
        self.finish = delta.finish
        for position, id_ in enumerate(delta.ids):
            ids.append(id_)
            if delta.logprobs is not None:
                self._add_logprob(logprobs, id_, self._score(delta, position))
            if id_ in self._shown_stop_ids:
                self.finish = "stop"
                break
            self.token_count += 1
            new = self._decoder.push((id_,))
            self._offset += len(new)
            text += self._cutter.push(new)
            if self._cutter.stopped:
                break
        if self.finish is not None and not self._cutter.stopped:
            text += self._cutter.push(self._decoder.finish())
            text += self._cutter.finish()
        if self._cutter.stopped:
            self.finish = "stop"
        return TextChoice(
            index=self._index,
            text=text,
            logprobs=self._requested_logprobs(logprobs),
            finish_reason=None if self.finish is None else finish_reason(self.finish),
            token_ids=ids if self._request.return_token_ids else None,
        )

    def _requested_logprobs(self, logprobs: TextLogprobs) -> TextLogprobs | None:
        return logprobs if self._request.wants_logprobs else None

    def _score(self, delta: Delta, position: int) -> TokenScore:
        """How likely a new id is, with the most likely ones if they are known."""
        logprobs = delta.logprobs or ()
        top: Alternatives = ()
        if delta.top_logprobs is not None:
            top = delta.top_logprobs[position]
        elif self._is_greedy:
            top = ((delta.ids[position], logprobs[position]),)
        return TokenScore(logprobs[position], top)

    def _add_logprob(self, logprobs: TextLogprobs, id_: int, score: TokenScore | None) -> None:
        name = self._token_name(id_)
        logprob = None if score is None else max(score.logprob, IMPOSSIBLE_LOGPROB)
        logprobs.tokens.append(name)
        logprobs.token_logprobs.append(logprob)
        logprobs.text_offset.append(self._offset)
        if not self._request.logprobs:
            return
        tops: dict[str, float] | None = None
        if score is not None and score.top and logprob is not None:
            # Two ids may have the same name: keep the greater value.
            tops = {name: logprob}
            for other, value in score.top:
                other_name = self._token_name(other)
                tops[other_name] = max(tops.get(other_name, IMPOSSIBLE_LOGPROB), value)
        if logprobs.top_logprobs is None:
            logprobs.top_logprobs = []
        logprobs.top_logprobs.append(tops)

    def _token_name(self, id_: int) -> str:
        data = self._template.token_bytes[id_]
        if self._request.return_tokens_as_token_ids:
            return f"token_id:{id_}"
        if not data:
            return self._template.tokenizer.backend_tokenizer.id_to_token(id_) or f"token_id:{id_}"
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def append(choice: TextChoice, piece: TextChoice) -> None:
    """Add the next part of a choice to those before it."""
    choice.text += piece.text
    choice.finish_reason = piece.finish_reason
    if choice.token_ids is not None:
        choice.token_ids += piece.token_ids or ()
    if choice.logprobs is not None and piece.logprobs is not None:
        choice.logprobs.tokens += piece.logprobs.tokens
        choice.logprobs.token_logprobs += piece.logprobs.token_logprobs
        choice.logprobs.text_offset += piece.logprobs.text_offset
        if piece.logprobs.top_logprobs is not None:
            choice.logprobs.top_logprobs = (choice.logprobs.top_logprobs or []) + piece.logprobs.top_logprobs


def encode_choice(choice: TextChoice) -> str:
    """A complete choice as JSON; its lists, which may be long, entry by entry."""
    if choice.logprobs is None:
        return choice.model_dump_json()
    lists = {name: "null" if values is None else json_list(map(json.dumps, values)) for name, values in choice.logprobs}
    return json_with(choice, logprobs=json_with(TextLogprobs(), **lists))
