"""A source in the recipe → raw rows, one at a time: `.jsonl` and `.json` files, and data assets.

A row that cannot be read becomes a row with a fault, and reading goes on; a file that cannot be read is an error. A
`.jsonl` file is read line by line, so its size does not matter; a `.json` file is held in memory.

This module does not know what a row means: that is `formats`.
"""

from __future__ import annotations

import codecs
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from corral import assets
from corral.errors import DataError
from corral.progress import Progress
from corral.recipe import Source

# No row that fits a model's context comes near it; a file without line breaks must not fill the memory.
_LONGEST_LINE = 64 * 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in a source.

    Args:
        index: its number, from 1: the line of a `.jsonl` file, the place in the list of a `.json` file.
        value: the JSON object, or None where there is a fault.
        fault: what is wrong with it and where, for a person: `line 17: not valid JSON: …`.
        reason: the part of `fault` that does not name the place, so that equal faults can be counted together.
    """

    index: int
    value: dict[str, Any] | None
    fault: str | None = None
    reason: str | None = None


def read(source: Source, progress: Progress | None = None) -> Iterator[RawRow]:
    """The rows of a source, in its order. An asset is fetched first, and its licence shown if that downloaded it.

    Raises:
        DataError: the file is missing, empty, not UTF-8 text, of an unknown kind or, if `.json`, broken.
        AssetError: the asset cannot be had.
    """
    if source.path.startswith("asset:"):
        return _read_asset(source.path.removeprefix("asset:"), progress or Progress())
    path = require_file(source)
    return _READERS[path.suffix.lower()](path)


def require_file(source: Source) -> Path:
    """The file of a source that is no asset: it exists, is not empty, and is of a kind that can be read.

    Raises:
        DataError: otherwise.
    """
    path = Path(source.path)
    if source.path.startswith("hub:"):
        raise DataError(f"{source.path!r}: data sets on the hub cannot be read yet", hint="save it as a .jsonl file")
    if path.is_dir():
        raise DataError("this is a folder, not a file", where=str(path), hint=f"name one file in it{_names_in(path)}")
    if not path.is_file():
        raise DataError(f"there is no file {path.name!r}", where=str(path), hint=_did_you_mean(path))
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"{path.suffix or 'a name without extension'!r} is no kind of file that can be read",
            where=str(path),
            hint=f"the kinds are {', '.join(_READERS)}; .jsonl holds one JSON object on each line",
        )
    if path.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path), hint="write rows into it, or name another file")
    return path


def _read_asset(name: str, progress: Progress) -> Iterator[RawRow]:
    asset = assets.find_asset(name)
    if asset.kind != "data" or name not in _ASSET_ROWS:
        kind = "no data set" if asset.kind != "data" else "data that is not read as rows"
        raise DataError(
            f"asset {name!r} is {kind}", where="data.sources", hint=f"assets with rows: {', '.join(_ASSET_ROWS)}"
        )
    fetched = assets.fetch(name, progress=progress.say)
    if fetched.fetched:
        progress.say(fetched.licence_text)
    return _ASSET_ROWS[name](fetched.files[0])


def _jsonl(path: Path) -> Iterator[RawRow]:
    decoder = _Decoder()
    some = False
    with _opened(path) as file:
        offset = 0
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE:
                raise DataError(
                    f"line {number} is longer than {_LONGEST_LINE // 2**20} MiB",
                    where=str(path),
                    hint="a .jsonl file holds one row on each line; a list of rows is a .json file",
                )
            text = _text(line, path, offset, number).rstrip()
            offset += len(line)
            if text:
                some = True
                yield _row(decoder, text, number)
    if not some:
        raise DataError("the file holds only blank lines", where=str(path), hint="write rows into it")


def _row(decoder: _Decoder, text: str, number: int) -> RawRow:
    try:
        value, end, reason = decoder.decode(text, _skip_space(text, 0))
        if reason is None and end < len(text):
            reason = "more text follows the object on its line"
    except json.JSONDecodeError as error:
        # The column changes from row to row: it belongs to the place, not to the reason.
        reason = f"not valid JSON: {_lower(error.msg)}"
        return RawRow(number, None, f"line {number}, column {error.colno}: {reason}", reason)
    except (ValueError, RecursionError) as error:
        value, reason = None, _cannot_hold(error)
    return _checked(number, f"line {number}", value, reason)


def _json(path: Path) -> Iterator[RawRow]:
    text = _whole_text(path)
    start = _skip_space(text, 0)
    if not text.startswith("[", start):
        what = "an object" if text.startswith("{", start) else "no list"
        raise DataError(
            f"the file holds {what}, where a list of rows is expected",
            where=str(path),
            hint="[{…}, {…}]; one object on each line is a .jsonl file",
        )
    return _items(text, start, path, keyed=False)


def _json_values(path: Path) -> Iterator[RawRow]:
    """Rows that are the values of one object."""
    text = _whole_text(path)
    return _items(text, _skip_space(text, 0), path, keyed=True)


def _items(text: str, start: int, path: Path, *, keyed: bool) -> Iterator[RawRow]:
    """The elements of the list, or values of the object, that begins at `start`, decoded one after another."""
    decoder = _Decoder()
    close = "}" if keyed else "]"
    at = _skip_space(text, start + 1)
    if text.startswith(close, at):
        raise DataError("the list of rows is empty", where=str(path), hint="write rows into it")
    number, separator = 0, ","
    while separator == ",":
        number += 1
        try:
            if keyed:
                _, at, _ = decoder.decode(text, at)
                _, at = _expect(text, at, ":")
            value, at, reason = decoder.decode(text, at)
            separator, at = _expect(text, at, f",{close}")
        except json.JSONDecodeError as error:
            _refuse_broken(error, path, f"row {number}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"row {number}: {_cannot_hold(error)}", where=str(path), hint="mend that row") from None
        yield _checked(number, f"row {number}", value, reason)
    if at < len(text):
        _refuse_broken(json.JSONDecodeError("more text follows the end of the list", text, at), path, "the file's end")


def _expect(text: str, at: int, characters: str) -> tuple[str, int]:
    """(the one of `characters` found, where the next token begins)."""
    at = _skip_space(text, at)
    found = text[at : at + 1]
    if not found or found not in characters:
        raise json.JSONDecodeError(f"expected {' or '.join(map(repr, characters))}", text, at)
    return found, _skip_space(text, at + 1)


def _skip_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _refuse_broken(error: json.JSONDecodeError, path: Path, row: str) -> NoReturn:
    raise DataError(
        f"broken at line {error.lineno}, column {error.colno}, in {row}: {_lower(error.msg)}",
        where=str(path),
        hint="mend it there; in a .jsonl file one broken row would not stop the others",
    ) from None


class _Decoder:
    """Strict JSON: what Python's reader lets pass (NaN, infinity, one key twice) becomes a reason to refuse the row."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._json = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str, at: int) -> tuple[Any, int, str | None]:
        """(the value that begins at `at`, where it ends, what is wrong with it).

        Raises:
            JSONDecodeError: it is not JSON.
            ValueError, RecursionError: Python cannot hold it.
        """
        self._reason = None
        value, end = self._json.raw_decode(text, at)
        return value, end, self._reason

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            self._reason = f"the key {_short(twice)} stands twice in one object"
        return value

    def _constant(self, name: str) -> None:
        self._reason = f"{name} is not a JSON number"

    def _float(self, digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            self._reason = "a number is too large"
        return value


def _checked(number: int, place: str, value: Any, reason: str | None) -> RawRow:
    if reason is None and not isinstance(value, dict):
        kinds = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
        reason = f"the row is {kinds.get(type(value), 'a number')}, where an object is expected"
    if reason is not None:
        return RawRow(number, None, f"{place}: {reason}", reason)
    return RawRow(number, cast("dict[str, Any]", value))


def _cannot_hold(error: ValueError | RecursionError) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else "an integer has too many digits"


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None


def _whole_text(path: Path) -> str:
    with _opened(path) as file:
        content = file.read()
    text = _text(content, path, 0, 1)
    if not text.strip():
        raise DataError("the file holds only white space", where=str(path), hint="write rows into it")
    return text


def _text(content: bytes, path: Path, offset: int, line: int) -> str:
    """UTF-8 text of bytes that begin at `offset` of a file, in line number `line`."""
    if offset == 0:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError("the file is UTF-16, not UTF-8", where=str(path), hint="save it again as UTF-8")
        if content.startswith(codecs.BOM_UTF8):
            content, offset = content[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
    if (at := content.find(b"\0")) >= 0:
        raise DataError(
            f"not a text file: byte {offset + at} (line {line + content[:at].count(10)}) is zero",
            where=str(path),
            hint="name a file of JSON text in UTF-8",
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise DataError(
            f"not UTF-8: byte {offset + at} (line {line + content[:at].count(10)}) is 0x{content[at]:02x}",
            where=str(path),
            hint="save the file again as UTF-8; `iconv -f latin1 -t utf-8` converts Western European text",
        ) from None


def _did_you_mean(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {str(folder)!r} either"
    close = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir() if p.is_file()], n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"check `path` in data.sources{_names_in(folder)}"


def _names_in(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir() if p.suffix.lower() in _READERS)
    return f"; there are {', '.join(names[:5])}" + (" …" if len(names) > 5 else "") if names else ""


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]


_READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {".jsonl": _jsonl, ".json": _json}
_ASSET_ROWS: dict[str, Callable[[Path], Iterator[RawRow]]] = {"wikibooks-recipes": _json_values}
