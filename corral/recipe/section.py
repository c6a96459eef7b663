"""The base class of all sections of a recipe, and types that several sections use."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _refuse_control_characters(path: str) -> str:
    """Raises ValueError for a path such as "C:\\temp", in which TOML reads backslash and t as a tab."""
    if path.isprintable():
        return path
    raise ValueError(
        f"{path!r} holds a tab, a line break or another character that no path has: between double quotes, backslash and t "
        "is a tab; put a path with backslashes between single quotes, or write it with /"
    )


PathText = Annotated[str, AfterValidator(_refuse_control_characters)]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is also a file's."""


class Section(BaseModel):
    """A table of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, serialize_by_alias=True
    )


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class in a field's type, which may be optional or a list; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for arg in get_args(annotation):
        if (inner := section_type(arg)) is not None:
            return inner
    return None
