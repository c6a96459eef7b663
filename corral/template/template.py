"""A chat template bound to a tokenizer: conversations to token ids and loss mask, with guarantees that are checked.

Training, evaluation and serving all use a Template, so a model is prompted as it was trained:

- A prompt's ids are always a prefix of the ids of prompt and answer, because answers are tokenised separately.
- A conversation without a system message has the template's, if it has one: here, and wherever its saved form is rendered.
- Text in a message is text: a special-token string typed by a user becomes ordinary tokens, in training as in serving.
- The mask comes from the template, never from searching the text: from `{% generation %}` markers where the template has
  them; else from a shipped template that renders exactly the same text; else from the verified difference between
  renderings with and without the answer.
- Every answer ends in a trained token, and that token is in `stop_ids`, with all others that end the model's answers.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.errors import ModelError, TemplateError
from corral.messages import Conversation, Message
from corral.storage import write_json
from corral.template.decoding import StreamDecoder, TokenBytes
from corral.template.rendering import (
    JinjaTemplate,
    Messages,
    Pieces,
    Variables,
    fix_dates,
    split_system,
    with_defaults,
    with_system,
)
from corral.template.tokenization import Encoded, PieceTokenizer
from corral.template.tokenizer_files import save_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_PROBES = (
    Conversation.from_turns(("user", "What is 2 + 2?"), ("assistant", "Four.")),
    Conversation.from_turns(
        ("user", "Hello"), ("assistant", "Hi!"), ("user", "And again?"), ("assistant", "Ünïcode — 東京 🙂")
    ),
)
_MARK = "System message that no template brings."
# Two templates that render these equally may still differ elsewhere: every text that is encoded is compared again.
_EQUIVALENCE_PROBES = (
    *_PROBES,
    Conversation.from_turns(
        ("system", " Be brief.\n"), ("user", "\n a \n"), ("assistant", " b\n\n"), ("user", "c "), ("assistant", "\td")
    ),
)


class _UnmaskableError(TemplateError):
    """The answers cannot be separated from the text around them."""


class Template:
    """A chat template bound to a tokenizer.

    Args:
        tokenizer: a fast tokenizer. It is not changed.
        source: Jinja2 text, with or without `{% generation %}` markers.
        name: its name in errors and reports.
        variables: values of further variables that it reads, here and wherever its saved form is rendered.
        system: system message of conversations without one, in place of the one that `source` brings, if it does.
        end_ids: further ids that end the model's answers, as its generation config names them.
        embedding_rows: how many tokens the model's embedding has, from id 0; None if it is not known.

    Raises:
        ModelError: it writes a token that the embedding does not have.
        TemplateError: it cannot be rendered or masked, writes no end token after an answer, or leaves out the system message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        source: str,
        name: str,
        *,
        variables: Variables | None = None,
        system: str | None = None,
        end_ids: Iterable[int] = (),
        embedding_rows: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._embedding_rows = embedding_rows
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        own_system, source = split_system(source)
        self.system = own_system if system is None else system
        """System message of conversations without one."""
        self._rendering = JinjaTemplate(
            fix_dates(with_defaults(source, variables or {}, name)), tokenizer.special_tokens_map, name
        )
        self._marked_source = self._rendering.source
        self.bare_source = self._rendering.stripped().source
        """The saved form without the system message."""
        self.source = with_system(self.bare_source, self.system)
        """The saved form, which other programs render: without markers, with a fixed date and the system message."""
        self._piece_tokenizer = PieceTokenizer(tokenizer, self._marked_source)
        self._check_system()
        self._equivalent = None if self._rendering.marked else self._find_equivalent()
        self._own_stop_ids = self._verify()
        self.stop_ids = tuple(sorted({*self._own_stop_ids, *end_ids}))
        """Ids that end an answer: the token that the template puts after answers, the tokenizer's end of sequence, and
        `end_ids`."""

    @classmethod
    def load(
        cls,
        tokenizer: PreTrainedTokenizerFast,
        spec: str = "tokenizer",
        *,
        variables: Variables | None = None,
        system: str | None = None,
        end_ids: Iterable[int] = (),
        embedding_rows: int | None = None,
    ) -> Template:
        """The template of `model.template`: `tokenizer`, `tokenizer:NAME`, a shipped one, or a `.jinja` file.

        Raises: as the class.
        """
        source, name = _read_source(tokenizer, spec)
        return cls(
            tokenizer, source, name, variables=variables, system=system, end_ids=end_ids, embedding_rows=embedding_rows
        )

    @property
    def masked_by(self) -> str:
        """How the mask is made: `markers`, `difference`, or `markers of NAME`, a shipped template."""
        if self._rendering.marked:
            return "markers"
        return "difference" if self._equivalent is None else f"markers of {self._equivalent.name}"

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the saved source and the ids of its special tokens."""
        ids = {token: self._backend.token_to_id(token) for token in self._piece_tokenizer.control}
        return hashlib.sha256(json.dumps([self.source, ids], sort_keys=True).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that ids and mask depend on: `digest`, the markers and the whole tokenizer."""
        markers = self._marked_source if self._equivalent is None else self._equivalent.source
        parts: list[Any] = [self.digest, markers, self._backend.to_str()]
        if self._embedding_rows is not None and max(self._backend.get_vocab().values()) >= self._embedding_rows:
            parts.append(self._embedding_rows)  # which rows can be encoded depends on it
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that this template writes, ascending."""
        written = {i for i in self.encode(_PROBES[0]).ids if i in self._piece_tokenizer.control_ids}
        return tuple(sorted(written | set(self._own_stop_ids)))

    def check_embedded(self, ids: Iterable[int], where: str) -> None:
        """Raises ModelError if the model's embedding does not have one of these tokens, which occur at `where`."""
        rows = self._embedding_rows
        beyond = next((id_ for id_ in ids if rows is not None and id_ >= rows), None)
        if beyond is not None:
            raise ModelError(
                f"the tokenizer has the token {self._backend.id_to_token(beyond)!r} with id {beyond}, and the model's "
                f"embedding has {rows} rows, from id 0",
                where=where,
                hint="give the model a row for each token (in transformers: model.resize_token_embeddings(len(tokenizer))) or "
                "use the tokenizer that it was made with",
            )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids of the prompt for the next answer. Raises TemplateError (already answered, or refused by the template)."""
        if conversation.answered:
            raise TemplateError("the conversation already ends with an answer: there is nothing to generate")
        messages = self._messages(conversation)
        try:
            # Earlier answers are tokenised separately, as they were in training and when they were generated.
            pieces = self._pieces(messages, generation_prompt=True)
        except _UnmaskableError:
            pieces = [(self._rendering.text(messages, generation_prompt=True), False)]
        return list(self._piece_tokenizer.tokenize(pieces).ids)

    def continuation(self, conversation: Conversation) -> list[int]:
        """Ids of a prompt that ends within the last answer, as the model would have written it so far.

        Raises TemplateError (refused by the template, or the template does not render the answer as it is).
        """
        head, answer = conversation.split_answer()
        if not answer.strip():
            return self.prompt(head)
        messages = self._messages(conversation)
        try:
            pieces = self._pieces(messages, generation_prompt=False)
        except _UnmaskableError:
            pieces = [(self._rendering.text(messages), False)]
        last = max((i for i, (_, is_answer) in enumerate(pieces) if is_answer), default=len(pieces) - 1)
        text, is_answer = pieces[last]
        end = self._piece_tokenizer.last_control(text)
        whole = messages[-1]["content"]
        for content in (whole, whole.rstrip(), whole.strip()):
            at = text.rfind(content, 0, end.start() if end else len(text))
            if at >= 0:
                pieces = [*pieces[:last], (text[: at + len(content)], is_answer)]
                return list(self._piece_tokenizer.tokenize(pieces).ids)
        raise TemplateError("the template changes the last answer, so it cannot be continued", where=self.name)

    @cached_property
    def renders_any_system(self) -> bool:
        """Whether it renders several system messages, and later ones, where they stand."""
        system = Message("system", _MARK)
        return self._marks((system, system, *_PROBES[0].messages, system, *_PROBES[0].messages[:1])) == 3

    @cached_property
    def renders_system_alone(self) -> bool:
        """Whether it renders a prompt of a system message alone."""
        return self._marks((Message("system", _MARK),)) == 1

    def _marks(self, messages: Sequence[Message]) -> int:
        """How often the text of a prompt contains `_MARK`."""
        with suppress(TemplateError):
            text = self._rendering.text(self._messages(Conversation((*messages,))), generation_prompt=True)
            return text.count(_MARK)
        return 0

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids of the whole conversation; only the answers that are to be trained, and their end tokens, are.

        Raises:
            TemplateError: the template refuses the conversation, or its answers cannot be separated from the other text.
        """
        return self._piece_tokenizer.tokenize(self._checked_pieces(conversation))

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | TemplateError]:
        """For each what `encode` returns or raises, a little faster; batches of some hundreds are large enough."""
        checked: list[Pieces | TemplateError] = []
        for conversation in conversations:
            try:
                checked.append(self._checked_pieces(conversation))
            except TemplateError as error:
                checked.append(error)
        encoded = iter(self._piece_tokenizer.tokenize_batch([c for c in checked if not isinstance(c, TemplateError)]))
        return [c if isinstance(c, TemplateError) else next(encoded) for c in checked]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for one stream of ids."""
        return StreamDecoder(self.token_bytes)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each id adds to a text."""
        return TokenBytes(self._backend)

    def save(self, folder: Path) -> None:
        """Write the tokenizer with the saved form of this template, and no other template, into a model folder."""
        save_tokenizer(self.tokenizer, folder)
        shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
        (folder / "chat_template.jinja").write_text(self.source, "utf-8")
        config_path = folder / "tokenizer_config.json"
        config: dict[str, Any] = json.loads(config_path.read_text("utf-8"))
        config.pop("chat_template", None)
        write_json(config_path, config)

    def _check_system(self) -> None:
        """Raises TemplateError if the template does not render its system message as the text that it is."""
        if self.system is None:
            return
        question = _PROBES[0].split_answer()[0]
        special = next((token for token in self._piece_tokenizer.control if token in self.system), None)
        problem = f"it contains {special!r}, which other programs read as that token" if special else None
        if "\0" in self.system:
            problem = "it contains a NUL, at which llama.cpp ends a template"
        if not problem:
            try:
                text = self._rendering.text(self._messages(question), generation_prompt=True)
                marked = Conversation((Message("system", _MARK), *question.messages))
                renders = _MARK in self._rendering.text(self._messages(marked), generation_prompt=True)
            except TemplateError as error:
                problem = error.what
            else:
                problem = None if renders and self.system.strip() in text else "the template does not render it"
        if problem:
            raise TemplateError(
                f"the system message cannot be used: {problem}",
                where=f"data.system, {self.name}",
                hint="use a template that renders system messages (model.template), or change or remove `system` "
                "(`system_override`)",
            )

    def _verify(self) -> set[int]:
        """Check the module's guarantees on probe conversations; returns the stop ids of template and tokenizer."""
        stop_ids: set[int] = set()
        saved = JinjaTemplate(self.source, self.tokenizer.special_tokens_map, self.name)
        for probe in _PROBES:
            try:
                encoded = self.encode(probe)
            except TemplateError:
                if not stop_ids:
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
            stop_ids.add(encoded.ids[last])
            if list(encoded.ids[: len(prompt)]) != prompt or not encoded.trained[len(prompt)]:
                raise TemplateError(
                    "a prompt rendered for an answer is not the beginning of prompt and answer",
                    where=self.name,
                    hint="correct the template's add_generation_prompt branch, or use another template",
                )
            if len(encoded.ids) > 1 and encoded.ids[0] == encoded.ids[1] == self.tokenizer.bos_token_id:
                raise TemplateError("the template writes the BOS token twice at the start", where=self.name)
            self.check_embedded(encoded.ids, self.name)
            if saved.text(probe.to_json()["messages"]) != self._rendering.text(self._messages(probe)):
                raise TemplateError(
                    "the template renders other text without its generation markers",
                    where=self.name,
                    hint="put no line break or space between a marker and its neighbours",
                )
        if self.tokenizer.eos_token_id is not None:
            eos: Any = self.tokenizer.eos_token_id
            stop_ids.add(int(eos))
        return stop_ids

    def _messages(self, conversation: Conversation) -> Messages:
        escape, messages = self._piece_tokenizer.escape, conversation.messages
        if self.system is not None and (not messages or messages[0].role != "system"):
            messages = (Message("system", self.system), *messages)
        return [{"role": message.role, "content": escape(message.content)} for message in messages]

    def _checked_pieces(self, conversation: Conversation) -> Pieces:
        """The pieces of a whole conversation. Raises TemplateError if an answer does not end in a special token."""
        pieces = self._pieces(self._messages(conversation), generation_prompt=False)
        if not all(piece.endswith(self._piece_tokenizer.control) for piece, is_answer in pieces if is_answer):
            raise TemplateError(
                "the template puts no special token after an answer: a model trained on it would never stop",
                where=self.name,
                hint="use a template whose answers end in one of the tokenizer's special tokens",
            )
        trained = [message.trained for message in conversation.messages if message.role == "assistant"]
        return pieces if all(trained) else self._mark_trained(pieces, trained)

    def _mark_trained(self, pieces: Pieces, trained: Sequence[bool]) -> Pieces:
        """The pieces with only those answers trained for which `trained` says so."""
        if sum(is_answer for _, is_answer in pieces) != len(trained):
            raise TemplateError(
                "the template does not render one text for each answer, and not all answers are to be trained",
                where=self.name,
                hint="use a template that renders every answer",
            )
        flags = iter(trained)
        return [(text, is_answer and next(flags)) for text, is_answer in pieces]

    def _pieces(self, messages: Messages, *, generation_prompt: bool) -> Pieces:
        """The rendered text, split into answers and other text. Raises TemplateError."""
        if self._rendering.marked:
            return self._rendering.pieces(messages, generation_prompt=generation_prompt)
        text = self._rendering.text(messages, generation_prompt=generation_prompt)
        if self._equivalent is not None:
            with suppress(TemplateError):
                pieces = self._equivalent.pieces(messages, generation_prompt=generation_prompt)
                if "".join(piece for piece, _ in pieces) == text:
                    return pieces
        return self._pieces_by_difference(messages, text)

    def _pieces_by_difference(self, messages: Messages, text: str) -> Pieces:
        """A text without markers, split where renderings of its first turns begin and end."""
        pieces: Pieces = []
        position = 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._rendering.text(messages[:i], generation_prompt=True)
            after = self._rendering.text(messages[: i + 1])
            last = self._piece_tokenizer.last_control(after, len(before))
            last_before = self._piece_tokenizer.last_control(before)
            reason = ""
            if not (text.startswith(after) and after.startswith(before)):
                reason = f"turn {i + 1} renders differently alone than within the conversation"
            elif last and last_before and after[last.start() :] == before[last_before.start() :]:
                reason = "after each answer the template begins another one"
            if reason:
                raise _UnmaskableError(
                    f"unmaskable: {reason}",
                    where=self.name,
                    hint="use a template with {% generation %} markers, or single-turn conversations",
                )
            # Text after the end token (usually a line break) is written by the template, never by the model.
            end = last.end() if last else len(after)
            pieces += [(text[position : len(before)], False), (text[len(before) : end], True)]
            position = end
        return [piece for piece in [*pieces, (text[position:], False)] if piece[0]]

    def _find_equivalent(self) -> JinjaTemplate | None:
        """A shipped template, which has markers, that renders every probe to the same text as this one."""
        probes = [self._messages(probe) for probe in _EQUIVALENCE_PROBES]
        turns = [(probe[:-1], True) for probe in probes] + [(probe, False) for probe in probes]
        texts = [_text_or_none(self._rendering, *turn) for turn in turns]
        for name, source in shipped_templates().items():
            other = JinjaTemplate(source, self.tokenizer.special_tokens_map, name)
            if any(texts) and texts == [_text_or_none(other, *turn) for turn in turns]:
                return other
        return None


def own_templates(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """The chat templates that come with a tokenizer, by name; a single one is `default`."""
    given: Any = tokenizer.chat_template
    return {"default": given} if isinstance(given, str) else dict(given or {})


def _read_source(tokenizer: PreTrainedTokenizerFast, spec: str) -> tuple[str, str]:
    """(Jinja2 source, name in errors) of `model.template`. Raises TemplateError."""
    kind, _, choice = spec.partition(":")
    if kind == "tokenizer":
        own = own_templates(tokenizer)
        if choice in own:
            return own[choice], f"the tokenizer's template {choice!r}"
        if not choice and "default" in own:
            return own["default"], "the tokenizer's own template"
        if own:
            raise TemplateError(
                f"the model's tokenizer has no chat template {choice or 'default'!r}: it has {', '.join(sorted(own))}",
                where="model.template",
                hint=f'choose one by its name, e.g. `template = "tokenizer:{min(own)}"`',
            )
        raise TemplateError(
            "the model's tokenizer has no chat template",
            where="model.template",
            hint='it is a base model: name a template made of tokens that it knows, e.g. `template = "instruction"`',
        )
    templates = shipped_templates()
    if spec in templates:
        return templates[spec], spec
    if spec.endswith(".jinja"):
        try:
            return Path(spec).read_bytes().decode("utf-8"), Path(spec).name
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"the template {spec!r} cannot be read: {error}", where="model.template") from None
    raise TemplateError(
        f"there is no template {spec!r}",
        where="model.template",
        hint=f"use `tokenizer`, `tokenizer:NAME`, a .jinja file, or one of: {', '.join(templates)}",
    )


def shipped_templates() -> dict[str, str]:
    """The templates that ship with corral, by name: Jinja2 source with markers."""
    files = (f for f in resources.files("corral.template").joinpath("shipped").iterdir() if f.name.endswith(".jinja"))
    return {f.name.removesuffix(".jinja"): f.read_text("utf-8") for f in sorted(files, key=lambda f: f.name)}


def _text_or_none(template: JinjaTemplate, messages: Messages, generation_prompt: bool) -> str | None:
    try:
        return template.text(messages, generation_prompt=generation_prompt)
    except TemplateError:
        return None
