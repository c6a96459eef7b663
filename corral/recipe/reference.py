"""Generates `docs/recipe.md` from the recipe's classes: every setting with its type, default and meaning.

`python -m corral.recipe.reference` prints the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from corral.recipe import Recipe, section_type


def reference() -> str:
    """The page, as Markdown."""
    lines = [
        "# Recipe reference",
        "",
        "Generated from `corral/recipe/` by `python -m corral.recipe.reference`; do not edit. Unknown keys are refused.",
        "`--set a.b=c` overrides any setting; entries of a list are named by number, from 0: `--set train.0.steps=20`.",
    ]
    references: list[str] = []
    shown: dict[type[BaseModel], str] = {}
    for path, section, meaning in _sections(Recipe, ""):
        title = path or "Top level"
        if section in shown:
            # Its inner sections are covered by this reference too.
            if not any(path.strip("[]").startswith(f"{p.strip('[]')}.") for p in references):
                references.append(path)
                text = " ".join(f"{meaning} The settings are those of `{shown[section]}`.".split())
                lines += ["", f"## {title}", "", text]
            continue
        shown[section] = title
        lines += ["", f"## {title}", "", " ".join((section.__doc__ or "").split()), ""]
        rows = [(name, field) for name, field in section.model_fields.items() if section_type(field.annotation) is None]
        if rows:
            lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        for name, field in rows:
            kind = _type_name(field.annotation, field.metadata).replace("|", "\\|")
            default = "required" if field.is_required() else _toml(field.default)
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{field.alias or name}` | {kind} | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _sections(section: type[BaseModel], path: str, meaning: str = "") -> Iterator[tuple[str, type[BaseModel], str]]:
    """Every section: its path, its class, and the meaning of the setting that holds it."""
    yield (f"[{path}]" if path and not path.endswith("]") else path), section, meaning
    for name, field in section.model_fields.items():
        inner = section_type(field.annotation)
        if inner is not None:
            child = f"{path.strip('[]')}.{name}" if path else name
            is_list = get_origin(field.annotation) is tuple
            yield from _sections(inner, f"[[{child}]]" if is_list else child, field.description or "")


def _toml(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' for v in value) + "]`"  # pyright: ignore[reportUnknownVariableType]
    return f"`{value!r}`".replace("'", '"')


def _type_name(annotation: Any, metadata: list[Any]) -> str:
    if args := get_args(annotation):
        if all(isinstance(a, str) for a in args):
            return " | ".join(f'"{a}"' for a in args)
        if getattr(annotation, "__origin__", None) is dict:
            return f"table of {_type_name(args[1], metadata)}"
        # Bounds inside a union belong to one of its types.
        inner = [m for a in args if isinstance(a, FieldInfo) for m in a.metadata] or metadata
        shown = [a for a in args if a not in (type(None), Ellipsis) and not isinstance(a, FieldInfo | AfterValidator)]
        names = [_type_name(a, inner) for a in shown]
        if getattr(annotation, "__origin__", None) is tuple:
            return f"list of {names[0]}"
        return " | ".join(dict.fromkeys(names)) if names else str(annotation)
    bounds = [
        f"{sign} {getattr(m, attribute):g}"
        for m in metadata
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(m, attribute, None) is not None
    ]
    names = {int: "integer", float: "number", str: "string", bool: "boolean"}
    return " ".join([names.get(annotation, str(annotation)), ", ".join(bounds)]).strip()


if __name__ == "__main__":
    print(reference(), end="")
