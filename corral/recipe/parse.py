"""Reads a recipe from a TOML file or text; errors list every fault with its key and line."""

from __future__ import annotations

import codecs
import difflib
import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from corral.errors import RecipeError
from corral.recipe.answer import Answer
from corral.recipe.data import Source
from corral.recipe.evaluate import BertScore
from corral.recipe.recipe import Recipe
from corral.recipe.section import section_type
from corral.recipe.train import Train

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ERROR_LINE = re.compile(r"at line (\d+)")
_QUOTED_BACKSLASH = re.compile(r'"([^"]*\\[^"]*)"')
_UNION_MEMBER = re.compile(r"(tuple|literal|list|dict)\[|constrained-|(int|float|str|bool)$")


def load(path: str | Path, overrides: Iterable[str] = (), *, stages_required: bool = True) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: a TOML file. Relative paths in it are resolved against its folder.
        overrides: `key=value` strings, e.g. `train.0.optimizer.lr=1e-4`; a value is TOML, or else a plain string.
        stages_required: False accepts a recipe without `[[train]]` and gives it one stage of defaults, for who only looks at
            its rows.

    Raises:
        RecipeError: the file cannot be read, is not TOML, or is not a valid recipe; all faults are listed.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if content.startswith(_UTF_16):
            raise RecipeError(
                "the recipe cannot be read: it is UTF-16 text, and TOML is UTF-8",
                where=str(path),
                hint="save it as UTF-8; in Windows PowerShell write it with `Set-Content -Encoding utf8` instead of `>`",
            )
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"there is no recipe {str(path)!r}",
            where=str(path.resolve()),
            hint="`corral init` writes one to start from",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe cannot be read: {error}", where=str(path), hint="give a TOML file") from None
    return parse(text, where=str(path), base=path.parent, overrides=overrides, stages_required=stages_required)


def parse(
    text: str,
    *,
    where: str,
    base: Path | None = None,
    overrides: Iterable[str] = (),
    stages_required: bool = True,
) -> Recipe:
    """Validate the text of a recipe; `where` names it in errors, `base` resolves relative paths, and the rest is as in `load`.

    Raises RecipeError.
    """
    text = text.removeprefix("\ufeff")  # the byte order mark of editors on Windows
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where=where, hint=_toml_hint(text, str(error))) from None
    for override in overrides:
        _apply_override(raw, override)
    if not stages_required:
        raw.setdefault("train", [{}])
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            "\n".join(_describe_errors(error.errors(), text)),
            where=where,
            hint="`docs/recipe.md` lists every setting with its type and meaning",
        ) from None
    return recipe if base is None else _resolve_paths(recipe, base)


def _toml_hint(text: str, message: str) -> str:
    """The next step after TOML's error message, which names a line of the text."""
    number = _ERROR_LINE.search(message)
    line = text.splitlines()[int(number[1]) - 1] if number else ""
    quoted = _QUOTED_BACKSLASH.search(line)
    if quoted is None:
        return "correct the line named above"
    path = quoted[1].replace("\\\\", "\\")
    return (
        f"a path with backslashes needs single quotes: '{path}'; or write it with /: \"{path.replace(chr(92), '/')}\""
    )


def _resolve_paths(recipe: Recipe, base: Path) -> Recipe:
    def resolve(spec: str, is_path: bool) -> str:
        return str((base / Path(spec).expanduser()).resolve()) if is_path else spec

    def is_file(spec: str) -> bool:
        return not spec.startswith(("asset:", "hub:", "s3://")) and not Path(spec).is_absolute()

    def resolve_source(source: Source) -> Source:
        return source.model_copy(update={"path": resolve(source.path, is_file(source.path)), "name": source.label})

    def resolve_shots(answer: Answer) -> Answer:
        if answer.shots.source is None:
            return answer
        shots = answer.shots.model_copy(update={"source": resolve_source(answer.shots.source)})
        return answer.model_copy(update={"shots": shots})

    def resolve_guards(stage: Train) -> Train:
        if stage.guards is None or stage.guards.prompts is None:
            return stage
        guards = stage.guards.model_copy(update={"prompts": resolve(stage.guards.prompts, is_path=True)})
        return stage.model_copy(update={"guards": guards})

    def resolve_bertscore(settings: BertScore) -> BertScore:
        # What is no path here may be a name on the hub.
        is_path = is_file(settings.model) and (base / Path(settings.model).expanduser()).exists()
        return settings.model_copy(update={"model": resolve(settings.model, is_path)})

    model, serve = recipe.model, recipe.serve
    sources = tuple(resolve_source(source) for source in recipe.data.sources)
    test = recipe.evaluate.test and resolve_source(recipe.evaluate.test)
    variants = tuple(v.model_copy(update={"answer": resolve_shots(v.answer)}) for v in recipe.evaluate.variants)
    return recipe.model_copy(
        update={
            "model": model.model_copy(
                update={
                    # A spec that is no path here may be a hub id without its prefix: the loader's error says so.
                    "base": resolve(
                        model.base, is_file(model.base) and (base / Path(model.base).expanduser()).exists()
                    ),
                    "adapter": model.adapter and resolve(model.adapter, is_file(model.adapter)),
                    "template": resolve(model.template, is_file(model.template) and model.template.endswith(".jinja")),
                }
            ),
            "data": recipe.data.model_copy(update={"sources": sources}),
            "train": tuple(resolve_guards(stage) for stage in recipe.train),
            "answer": resolve_shots(recipe.answer),
            "serve": serve.model_copy(update={"adapters": serve.adapters and resolve(serve.adapters, is_path=True)}),
            "evaluate": recipe.evaluate.model_copy(
                update={"variants": variants, "test": test, "bertscore": resolve_bertscore(recipe.evaluate.bertscore)}
            ),
        }
    )


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, separator, value_text = override.partition("=")
    where = f"--set {override}"
    if not separator or not key.strip():
        raise RecipeError(f"{override!r} is not `key=value`", where=where, hint="e.g. --set train.0.steps=20")
    try:
        value = tomllib.loads(f"value = {value_text}")["value"]
    except tomllib.TOMLDecodeError:
        value = value_text.strip()
    *parents, last = key.strip().split(".")
    node: Any = raw
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise RecipeError(
            f"{key.strip()!r} is not a setting of this recipe",
            where=where,
            hint="name an entry of a list by its number, from 0: train.0.steps, data.sources.1.rows",
        ) from None


def _describe_errors(errors: Sequence[Any], text: str) -> list[str]:
    """A sentence for each faulty key; errors of a table that only follow from one inside it are left out."""
    by_key: dict[tuple[str | int, ...], list[str]] = {}
    for error in errors:
        by_key.setdefault(_key_path(error), []).append(_describe_error(error, text))
    inner = [m for key, m in by_key.items() if not any(k[: len(key)] == key for k in by_key if k != key)]
    # A setting that may have one of several types has an error for each of them.
    return [first + "".join(f"; or {other.partition(': ')[2]}" for other in rest) for first, *rest in inner]


def _key_path(error: Any) -> tuple[str | int, ...]:
    """The path of the faulty key, without the names that pydantic gives to the members of a union."""
    return tuple(part for part in error["loc"] if isinstance(part, int) or not _UNION_MEMBER.match(part))


def _describe_error(error: Any, text: str) -> str:
    """A sentence that names the key's path, the value and, if it can be found, the line."""
    loc = _key_path(error)
    path = ".".join(str(part) for part in loc) or "the recipe"
    line = _find_line(loc, text)
    at = f"{path} (line {line})" if line else path
    if error["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), known, n=1)
        suggestion = f"did you mean {close[0]!r}?" if close else f"the keys here are {', '.join(known)}"
        return f"{at}: unknown key; {suggestion}"
    if error["type"] == "missing":
        return f"{at}: missing; it has no default"
    if error["type"] == "value_error":
        return f"{at}: {error['ctx']['error']}"
    value = error["input"]
    if error["type"] == "tuple_type":
        return f"{at}: a list is needed here, in brackets: {[value]!r}".replace("'", '"')
    given = "" if isinstance(value, dict | list | tuple) else f" (given: {value!r})"
    return f"{at}: {error['msg']}{given}"


def _find_line(loc: tuple[str | int, ...], text: str) -> int | None:
    """The line of a key, if exactly one line in the text can be it."""
    if not loc or not isinstance(loc[-1], str):
        return None
    pattern = re.compile(rf"^\s*(\[\[?[\w.]*\b)?{re.escape(loc[-1])}\s*(=|\])")
    lines = [i for i, line in enumerate(text.splitlines(), start=1) if pattern.match(line)]
    return lines[0] if len(lines) == 1 else None


def _known_keys(loc: tuple[str | int, ...]) -> list[str]:
    section: type[BaseModel] | None = Recipe
    for part in loc:
        if isinstance(part, str) and section is not None:
            section = section_type(section.model_fields[part].annotation) if part in section.model_fields else None
    return [field.alias or name for name, field in section.model_fields.items()] if section is not None else []
