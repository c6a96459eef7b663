"""Conversation ↔ token ids and trained mask: the only place where text meets special tokens.

Training, evaluation and serving all pass through one Template, so what a model is asked is what it was trained on:

- A prompt's ids are always a prefix of the ids of prompt and answer, because answers are tokenised apart.
- Text in a message is text: a special-token string typed by a user becomes ordinary tokens, in training as in serving.
- The mask comes from the template itself: from `{% generation %}` markers where the template has them, else from the
  verified difference between renderings with and without the answer. It is never searched for.
- Every answer ends in a token that is trained, and that token is in `stop_ids`.

This module does not know where conversations come from, how long they may be, or what is done with the ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corral.decoding import StreamDecoder, TokenBytes
from corral.errors import TemplateError
from corral.messages import Conversation

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# A Unicode noncharacter, never valid in interchanged text: it splits special strings that stand in a message.
_SPLIT = "\ufdd0"
# Templates that print today's date would make new ids each day; the date Meta's templates default to stands for all.
_FIXED_DATE = date(2024, 7, 26)
_MARKER = re.compile(r"\{%(?P<before>-?)\s*(?:end)?generation\s*(?P<after>-?)%\}")
_STRFTIME = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")
_PROBES = (
    Conversation.of(("user", "What is 2 + 2?"), ("assistant", "Four.")),
    Conversation.of(
        ("user", "Hello"), ("assistant", "Hi!"), ("user", "And again?"), ("assistant", "Ünïcode — 東京 🙂")
    ),
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of a conversation, and for each whether it is trained on."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]


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
        self._marked = _fix_date(source)
        self._has_markers = _MARKER.search(self._marked) is not None
        self.source = _strip_markers(self._marked)
        """The form that is saved and that others render: no markers, fixed date."""
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._control = _control_tokens(tokenizer, self._marked)
        self._control_pattern = _any_of(self._control)
        self._encoders = _piece_encoders(self._backend)
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
                    hint='it is a base model: name a template, e.g. `template = "chatml"`',
                )
            return cls(tokenizer, source, "the tokenizer's own template")
        shipped = {f.name.removesuffix(".jinja"): f for f in resources.files("corral.templates").iterdir()}
        if spec in shipped:
            return cls(tokenizer, shipped[spec].read_text("utf-8"), spec)
        if spec.endswith(".jinja"):
            try:
                return cls(tokenizer, Path(spec).read_bytes().decode("utf-8"), Path(spec).name)
            except (OSError, UnicodeDecodeError) as error:
                raise TemplateError(f"the template {spec!r} cannot be read: {error}", where="model.template") from None
        raise TemplateError(
            f"there is no template {spec!r}",
            where="model.template",
            hint=f"use `tokenizer`, a .jinja file, or one of: {', '.join(sorted(shipped))}",
        )

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of what decides the ids: the saved source and the ids of its control tokens."""
        ids = {token: self._id(token) for token in self._control}
        return hashlib.sha256(json.dumps([self.source, ids], sort_keys=True).encode()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of everything that decides ids and mask: `digest`, the markers and the whole tokenizer."""
        parts = [self.digest, self._marked, self._backend.to_str()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens this template writes, ascending."""
        written = {i for i in self.encode(_PROBES[0]).ids if i in self._control_ids}
        return tuple(sorted(written | set(self.stop_ids)))

    def prompt(self, conversation: Conversation) -> list[int]:
        """Ids that ask for the next assistant turn. Raises: TemplateError (already answered, or refused)."""
        if conversation.answered:
            raise TemplateError("the conversation already ends with an answer: there is nothing to ask for")
        text, _ = self._render(conversation, ask=True)
        return self._tokenise(text, after=[])

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids of the whole conversation; trained are the assistant's answers and their end tokens, nothing else.

        Raises:
            TemplateError: the template refuses the conversation, or its answers cannot be told from their surroundings.
        """
        text, spans = self._spans(conversation)
        ids: list[int] = []
        trained: list[bool] = []
        at = 0
        for start, end in [*spans, (len(text), len(text))]:
            for piece, is_trained in ((text[at:start], False), (text[start:end], True)):
                new = self._tokenise(piece, after=ids)
                ids += new
                trained += [is_trained] * len(new)
            at = end
        return Encoded(tuple(ids), tuple(trained))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def decoder(self) -> StreamDecoder:
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
            stripped, _ = self._render(probe, source=self.source)
            if stripped != self._render(probe)[0]:
                raise TemplateError(
                    "the template renders other text once its generation markers are removed",
                    where=self.name,
                    hint="put no line break or space between a marker and its neighbours",
                )
        if self.tokenizer.eos_token_id is not None:
            eos: Any = self.tokenizer.eos_token_id
            ends.add(int(eos))
        return tuple(sorted(ends))

    def _spans(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """The rendered text and the (start, end) characters of each answer with its end token."""
        if self._has_markers:
            text, spans = self._render(conversation)
            spans = [(start, end) for start, end in spans if end > start]
        else:
            text, spans = self._spans_by_difference(conversation)
        for start, end in spans:
            if not self._control_pattern.fullmatch(text, self._last_control(text, start, end), end):
                raise TemplateError(
                    "the template closes an answer with no special token: a model trained on it would never stop",
                    where=self.name,
                    hint="use a template whose answers end in one of the tokenizer's special tokens",
                )
        return text, spans

    def _last_control(self, text: str, start: int, end: int) -> int:
        return max((m.start() for m in self._control_pattern.finditer(text, start, end)), default=end)

    def _spans_by_difference(self, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        text, _ = self._render(conversation)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(conversation.messages):
            if message.role != "assistant":
                continue
            before, _ = self._render(Conversation(conversation.messages[:i]), ask=True)
            after, _ = self._render(Conversation(conversation.messages[: i + 1]))
            if not (text.startswith(after) and after.startswith(before)):
                raise TemplateError(
                    f"unmaskable: turn {i + 1} renders differently alone than within the conversation",
                    where=self.name,
                    hint="use a template with {% generation %} markers, or single-turn conversations",
                )
            # What follows the end token (a line break, usually) is written by the template, never by the model.
            last = self._last_control(after, len(before), len(after))
            found = self._control_pattern.match(after, last)
            spans.append((len(before), found.end() if found else len(after)))
        return text, spans

    def _render(
        self, conversation: Conversation, *, ask: bool = False, source: str | None = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """Rendered text, in which special strings typed in messages are split by `_SPLIT`, and marked spans."""
        from jinja2 import TemplateError as JinjaError
        from transformers.utils.chat_template_utils import render_jinja_template

        tokens: dict[str, Any] = dict(self.tokenizer.special_tokens_map)
        marked = source is None and self._has_markers
        try:
            texts, spans = render_jinja_template(
                conversations=[[{"role": m.role, "content": self._escape(m.content)} for m in conversation.messages]],
                chat_template=self._marked if source is None else source,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=ask,
                **tokens,
            )
        except (JinjaError, TypeError, KeyError, ValueError) as error:
            raise TemplateError(f"the template refuses this conversation: {error}", where=self.name) from None
        rendered: Any = texts[0]
        return str(rendered), [(int(s), int(e)) for s, e in spans[0]] if marked else []

    def _escape(self, content: str) -> str:
        if _SPLIT in content:
            raise TemplateError("the text contains U+FDD0, which is not a character", hint="remove it from the text")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TemplateError(f"the text is not valid Unicode: {error.reason} at {error.start}") from None
        # Looking ahead finds overlapping strings too; a split after the first character breaks each of them.
        starts = [m.start() + 1 for m in re.finditer(f"(?={self._control_pattern.pattern})", content)]
        cuts = [0, *starts, len(content)]
        return _SPLIT.join(content[a:b] for a, b in pairwise(cuts))

    def _tokenise(self, text: str, *, after: Sequence[int]) -> list[int]:
        """Ids of rendered text that follows the ids `after`."""
        ids: list[int] = []
        at = 0
        encoder = "begins" if not after else "after_special" if after[-1] in self._control_ids else "continues"
        separators = re.compile(f"{_SPLIT}|{self._control_pattern.pattern}")
        while at < len(text):
            found = separators.search(text, at)
            piece = text[at : found.start() if found else len(text)]
            if piece:
                ids += self._encoders[encoder].encode(piece, add_special_tokens=False).ids
            if not found:
                break
            if found.group() == _SPLIT:
                encoder = "continues"
            else:
                ids.append(self._id(found.group()))
                encoder = "after_special"
            at = found.end()
        return ids

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(self._id(token) for token in self._control)

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        assert found is not None, f"{token} is an added token without an id"
        return found


def _fix_date(source: str) -> str:
    return _STRFTIME.sub(lambda m: json.dumps(_FIXED_DATE.strftime(m["format"])), source)


def _strip_markers(source: str) -> str:
    # An empty comment takes the marker's place where the marker also trims white space around it.
    def replacement(marker: re.Match[str]) -> str:
        if marker["before"] or marker["after"]:
            return f"{{#{marker['before']} {marker['after']}#}}"
        at_line = source[: marker.start()].rpartition("\n")[2].strip() == "" or source[marker.end() :].startswith("\n")
        return "{# #}" if at_line else ""

    return _MARKER.sub(replacement, source)


def _control_tokens(tokenizer: PreTrainedTokenizerFast, source: str) -> tuple[str, ...]:
    """Added tokens that steer a model: the special ones, and any that the template writes; longest first."""
    tokens = {
        added.content for added in tokenizer.added_tokens_decoder.values() if added.special or added.content in source
    }
    # A token of one character cannot be split, and none that steers a model is so short.
    return tuple(sorted((t for t in tokens if len(t) > 1), key=lambda t: (-len(t), t)))


def _any_of(tokens: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(?:" + "|".join(map(re.escape, tokens)) + ")" if tokens else "(?!)")


def _piece_encoders(backend: Tokenizer) -> dict[str, Tokenizer]:
    """Tokenizers for text at the start, after a special token, and within running text.

    SentencePiece-style tokenizers put a space before the text they are given. transformers' whole-text tokenisation
    does so at the start and, in its "legacy" form (a Prepend normalizer), after each special token; within running text
    nobody does. Byte-level tokenizers make no difference.
    """
    from tokenizers import Tokenizer

    config: dict[str, Any] = json.loads(backend.to_str())
    config.update(truncation=None, padding=None, post_processor=None)
    begins = Tokenizer.from_str(json.dumps(config))
    _change(config.get("pre_tokenizer"), "Metaspace", {"prepend_scheme": {"first": "never"}})
    after_special = Tokenizer.from_str(json.dumps(config))
    _change(config.get("pre_tokenizer"), "Metaspace", {"prepend_scheme": {"always": "never"}})
    _change(config.get("pre_tokenizer"), "ByteLevel", {"add_prefix_space": {True: False}})
    _change(config.get("normalizer"), "Prepend", {"prepend": {"▁": ""}})
    return {"begins": begins, "after_special": after_special, "continues": Tokenizer.from_str(json.dumps(config))}


def _change(node: Any, kind: str, changes: dict[str, dict[Any, Any]]) -> None:
    """In a tokenizer's JSON, replace values in every component of a kind."""
    if not isinstance(node, dict):
        return
    for inner in (*node.get("normalizers", ()), *node.get("pretokenizers", ())):
        _change(inner, kind, changes)
    if node.get("type") == kind:
        for key, values in changes.items():
            node[key] = values.get(node.get(key), node.get(key))
