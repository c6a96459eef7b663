"""The forms that a model can be exported to, and their paths in an export directory."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from corral.errors import InputError
from corral.storage import link_or_copy_tree

GgufType: TypeAlias = Literal["f16", "q8_0", "q4_0"]
OpenVinoType: TypeAlias = Literal["f32", "f16", "int8", "int4"]
Target: TypeAlias = Literal["gguf", "openvino"]

EXPORT_TYPES: dict[Target, tuple[str, ...]] = {"gguf": get_args(GgufType), "openvino": get_args(OpenVinoType)}
OPENVINO_MODEL = "openvino_model.xml"
"""The file that makes a folder an OpenVINO model."""
CONTRACT_FILE = "contract.json"


@dataclass(frozen=True, slots=True)
class ExportForm:
    """A form to export a model to.

    Raises:
        InputError: the target has no such type.
    """

    target: Target
    type: str

    def __post_init__(self) -> None:
        if self.type not in EXPORT_TYPES.get(self.target, ()):
            raise InputError(
                f"{self.target!r} has no type {self.type!r}",
                where="--type",
                hint=f"types: {', '.join(EXPORT_TYPES.get(self.target, ()))}",
            )

    def path(self, out: Path) -> Path:
        """Its path in an export directory: a `.gguf` file, or a folder."""
        return out / (f"model-{self.type}.gguf" if self.target == "gguf" else f"openvino-{self.type}")

    def contract_path(self, out: Path) -> Path:
        """The path of its contract."""
        path = self.path(out)
        return path.with_suffix(".contract.json") if self.target == "gguf" else path / CONTRACT_FILE

    def copy_missing_from(self, old: Path, out: Path) -> None:
        """Copy this form's files from another export directory, except those that `out` has."""
        for path in (self.path(old), old / f"Modelfile-{self.type}", self.contract_path(old)):
            target = out / path.name
            if path.is_dir() and not target.exists():
                link_or_copy_tree(path, target)
            elif path.is_file() and path.parent == old and not target.exists():
                shutil.copyfile(path, target)

    def __str__(self) -> str:
        return f"{self.target} {self.type}"
