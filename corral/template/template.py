"""One chat template bound to one tokenizer, and the promises that it is held to.

Training, evaluation and serving all pass through one Template, so what a model is asked is what it was trained on:

- A prompt's ids are always a prefix of the ids of prompt and answer, because answers are tokenised apart.
- Text in a message is text: a special-token string typed by a user becomes ordinary tokens, in training as in serving.
- The mask comes from the template itself and is never searched for: from `{% generation %}` markers where the template has
  them; else from a template that ships with corral and renders the very same text; else from the verified difference
  between renderings with and without the answer.
- Every answer ends in a token that is trained, and that token is in `stop_ids`.

This module does not know where conversations come from, how long they may be, or what is done with the ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import TemplateError
from corral.messages import Conversation
from corral.template.decoding import StreamDecoder, TokenBytes
from corral.template.rendering import JinjaTemplate, Messages, Pieces
from corral.template.tokenization import PieceTokenizer, TokenizedPieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_PROBES = (
    Conversation.from_turns(("user", "What is 2 + 2?"), ("assistant", "Four.")),
    Conversation.from_turns(
        ("user", "Hello"), ("assistant", "Hi!"), ("user", "And again?"), ("assistant", "Ünïcode — 東京 🙂")
    ),
)
# Two templates that render these alike may still differ elsewhere: each text that is encoded is compared again.
_EQUIVALENCE_PROBES = (
    *_PROBES,
    Conversation.from_turns(
        ("system", " Be brief.\n"), ("user", "\n a \n"), ("assistant", " b\n\n"), ("user", "c "), ("assistant", "\td")
    ),
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation, and for each whether it is trained on."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


class _UnmaskableError(TemplateError):
    """Answers cannot be told from their surroundings."""


class Template:
    """One chat template bound to one tokenizer.

    Args:
        tokenizer: a fast tokenizer. It is not changed.
        source: Jinja2 text, with or without `{% generation %}` markers.
        name: what to call it in errors and reports.

    Raises:
        TemplateError: it cannot be rendered or masked, or writes no end token after an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, source: str, name: str) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._rendering = JinjaTemplate(source, tokenizer.special_tokens_map, name)
        self._marked_source = self._rendering.source
        self._stripped = self._rendering.stripped()
        self.source = self._stripped.source
        """The form that is saved and that others render: no markers, fixed date."""
        self._piece_tokenizer = PieceTokenizer(tokenizer, self._marked_source)
        self._equivalent = None if self._rendering.marked else self._find_equivalent()
        self.stop_ids = self._verify()
        """Ids that end an answer: the token the template closes answers with, and the tokenizer's end of sequence."""

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerFast, spec: str = "tokenizer") -> Template:
        """The template a recipe names: `tokenizer`, one that ships, or a `.jinja` file. Raises: TemplateError."""
        if spec == "tokenizer":
            source = tokenizer.chat_template
            if not isinstance(source, str):
                raise TemplateError(
                    "the model's tokenizer has no chat template",
                    where="model.template",
                    hint='it is a base model: name a template made of tokens it knows, e.g. `template = "instruction"`',
                )
            return cls(tokenizer, source, "the tokenizer's own template")
        ships = shipped_templates()
        if spec in ships:
            return cls(tokenizer, ships[spec], spec)
        if spec.endswith(".jinja"):
            try:
                return cls(tokenizer, Path(spec).read_bytes().decode("utf-8"), Path(spec).name)
            except (OSError, UnicodeDecodeError) as error:
                raise TemplateError(f"the template {spec!r} cannot be read: {error}", where="model.template") from None
        raise TemplateError(
            f"there is no template {spec!r}",
            where="model.template",
            hint=f"use `tokenizer`, a .jinja file, or one of: {', '.join(ships)}",
        )

    @property
    def masked_by(self) -> str:
        """How answers are told from the rest: `markers`, `difference`, or `markers of NAME`, a template that ships."""
        if self._rendering.marked:
            return "markers"
        return "difference" if self._equivalent is None else f"markers of {self._equivalent.name}"

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of what decides the ids: the saved source and the ids of its control tokens."""
        ids = {token: self._backend.token_to_id(token) for token in self._piece_tokenizer.control}
        return hashlib.sha256(json.dumps([self.source, ids], sort_keys=True).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides ids and mask: `digest`, the markers and the whole tokenizer."""
        markers = self._marked_source if self._equivalent is None else self._equivalent.source
        parts = [self.digest, markers, self._backend.to_str()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens this template writes, ascending."""
        written = {i for i in self.encode(_PROBES[0]).ids if i in self._piece_tokenizer.control_ids}
        return tuple(sorted(written | set(self.stop_ids)))

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids that ask for the next assistant turn. Raises: TemplateError (already answered, or refused)."""
        if conversation.answered:
            raise TemplateError("the conversation already ends with an answer: there is nothing to ask for")
        messages = self._messages(conversation)
        try:
            # Earlier answers are tokenised apart here too, as they were in training and when they were generated.
            pieces = self._pieces(messages, generation_prompt=True)
        except _UnmaskableError:
            pieces = [(self._rendering.text(messages, generation_prompt=True), False)]
        return list(self._piece_tokenizer.tokenize(pieces)[0])

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids of the whole conversation; trained are the assistant's answers and their end tokens, nothing else.

        Raises:
            TemplateError: the template refuses the conversation, or its answers cannot be told from their surroundings.
        """
        return Encoded(*self._piece_tokenizer.tokenize(self._checked_pieces(conversation)))

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | TemplateError]:
        """What `encode` gives or raises for each, a little faster; some hundreds at a time are enough."""
        results: list[Encoded | TemplateError | None] = [None] * len(conversations)
        indexes: list[int] = []
        texts: list[Pieces] = []
        for index, conversation in enumerate(conversations):
            try:
                texts.append(self._checked_pieces(conversation))
                indexes.append(index)
            except TemplateError as error:
                results[index] = error
        marked: list[TokenizedPieces] = self._piece_tokenizer.tokenize_batch(texts)
        for index, (ids, trained) in zip(indexes, marked, strict=True):
            results[index] = Encoded(ids, trained)
        return [result for result in results if result is not None]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one stream of ids."""
        return StreamDecoder(self.token_bytes)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """What each id adds to a text."""
        return TokenBytes(self._backend)

    def save(self, folder: Path) -> None:
        """Write the tokenizer with the saved form of this template into a model folder."""
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.source, "utf-8")
        config_path = folder / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_path.read_text("utf-8"))
        config.pop("chat_template", None)
        config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")

    def _verify(self) -> tuple[int, ...]:
        """Hold the module's promises on probe conversations; returns the stop ids."""
        ends: set[int] = set()
        for probe in _PROBES:
            try:
                encoded = self.encode(probe)
            except TemplateError:
                if not ends:
                    raise
                continue  # a template for single turns
            if True not in encoded.trained:
                raise TemplateError(
                    "the template's generation markers enclose no answer",
                    where=self.name,
                    hint="put {% generation %} before the assistant's content and {% endgeneration %} after its end token",
                )
            prompt = self.prompt(probe.split_answer()[0])
            last = max(i for i, t in enumerate(encoded.trained) if t)
            ends.add(encoded.ids[last])
            if list(encoded.ids[: len(prompt)]) != prompt or not encoded.trained[len(prompt)]:
                raise TemplateError(
                    "a prompt rendered for an answer is not the beginning of prompt and answer",
                    where=self.name,
                    hint="mend the template's add_generation_prompt branch, or use another template",
                )
            if len(encoded.ids) > 1 and encoded.ids[0] == encoded.ids[1] == self.tokenizer.bos_token_id:
                raise TemplateError("the template begins with the BOS token twice", where=self.name)
            messages = self._messages(probe)
            if self._stripped.text(messages) != self._rendering.text(messages):
                raise TemplateError(
                    "the template renders other text once its generation markers are removed",
                    where=self.name,
                    hint="put no line break or space between a marker and its neighbours",
                )
        if self.tokenizer.eos_token_id is not None:
            eos: Any = self.tokenizer.eos_token_id
            ends.add(int(eos))
        return tuple(sorted(ends))

    def _messages(self, conversation: Conversation) -> Messages:
        escape = self._piece_tokenizer.escape
        return [{"role": message.role, "content": escape(message.content)} for message in conversation.messages]

    def _checked_pieces(self, conversation: Conversation) -> Pieces:
        """The pieces of a whole conversation, each answer of which ends in a special token."""
        pieces = self._pieces(self._messages(conversation), generation_prompt=False)
        if not all(piece.endswith(self._piece_tokenizer.control) for piece, is_answer in pieces if is_answer):
            raise TemplateError(
                "the template closes an answer with no special token: a model trained on it would never stop",
                where=self.name,
                hint="use a template whose answers end in one of the tokenizer's special tokens",
            )
        return pieces

    def _pieces(self, messages: Messages, *, generation_prompt: bool) -> Pieces:
        """The rendered text, cut into answers and the rest. Raises: TemplateError."""
        if self._rendering.marked:
            return self._rendering.pieces(messages, generation_prompt=generation_prompt)
        text = self._rendering.text(messages, generation_prompt=generation_prompt)
        if self._equivalent is not None:
            pieces = _render_or_none(self._equivalent, messages, generation_prompt=generation_prompt)
            if pieces is not None and "".join(piece for piece, _ in pieces) == text:
                return pieces
        return self._pieces_by_difference(messages, text)

    def _pieces_by_difference(self, messages: Messages, text: str) -> Pieces:
        """A text without markers, cut where renderings of its first turns begin and end."""
        pieces: Pieces = []
        at = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendering.text(messages[:i], generation_prompt=True)
            after = self._rendering.text(messages[: i + 1])
            last = self._piece_tokenizer.last_control(after, len(before))
            asked = self._piece_tokenizer.last_control(before)
            fault = ""
            if not (text.startswith(after) and after.startswith(before)):
                fault = f"turn {i + 1} renders differently alone than within the conversation"
            elif last and asked and after[last.start() :] == before[asked.start() :]:
                fault = "after each answer the template begins another one"
            if fault:
                raise _UnmaskableError(
                    f"unmaskable: {fault}",
                    where=self.name,
                    hint="use a template with {% generation %} markers, or single-turn conversations",
                )
            # What follows the end token (a line break, usually) is written by the template, never by the model.
            end = last.end() if last else len(after)
            pieces += [(text[at : len(before)], False), (text[len(before) : end], True)]
            at = end
        return [piece for piece in [*pieces, (text[at:], False)] if piece[0]]

    def _find_equivalent(self) -> JinjaTemplate | None:
        """A template that ships, has markers, and renders every probe as this one does."""
        probes = [self._messages(probe) for probe in _EQUIVALENCE_PROBES]
        turns = [(probe[:-1], True) for probe in probes] + [(probe, False) for probe in probes]
        ours = [_render_or_none(self._rendering, messages, generation_prompt=ask) for messages, ask in turns]
        for name, source in shipped_templates().items():
            twin = JinjaTemplate(source, self.tokenizer.special_tokens_map, name)
            theirs = (_render_or_none(twin, messages, generation_prompt=ask) for messages, ask in turns)
            if any(ours) and all(_same_text(a, b) for a, b in zip(ours, theirs, strict=True)):
                return twin
        return None


def shipped_templates() -> dict[str, str]:
    """The templates that ship with corral, by name: their Jinja2 text, with markers."""
    files = (f for f in resources.files("corral.template").joinpath("shipped").iterdir() if f.name.endswith(".jinja"))
    return {f.name.removesuffix(".jinja"): f.read_text("utf-8") for f in sorted(files, key=lambda f: f.name)}


def _render_or_none(rendering: JinjaTemplate, messages: Messages, *, generation_prompt: bool) -> Pieces | None:
    try:
        return rendering.pieces(messages, generation_prompt=generation_prompt)
    except TemplateError:
        return None


def _same_text(one: Pieces | None, other: Pieces | None) -> bool:
    if one is None or other is None:
        return one is other
    return "".join(piece for piece, _ in one) == "".join(piece for piece, _ in other)
