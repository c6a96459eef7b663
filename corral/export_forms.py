"""The forms a model can be exported to: their names, and where they stand in an export directory.

Does not know how they are made or read.
"""

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
"""What makes a folder one that OpenVINO can compute."""
CONTRACT_FILE = "contract.json"


@dataclass(frozen=True, slots=True)
class ExportForm:
    """A form to export to.

    Raises:
        InputError: no such type of that target.
    """

    target: Target
    type: str

    def __post_init__(self) -> None:
        if self.type not in EXPORT_TYPES.get(self.target, ()):
            raise InputError(
                f"there is no type {self.type!r} of {self.target!r}",
                where="--type",
                hint=f"types: {', '.join(EXPORT_TYPES.get(self.target, ()))}",
            )

    def path(self, out: Path) -> Path:
        """Where the form stands under an export directory: a `.gguf` file, or a folder."""
        return out / (f"model-{self.type}.gguf" if self.target == "gguf" else f"openvino-{self.type}")

    def contract_path(self, out: Path) -> Path:
        """Where its contract stands."""
        place = self.path(out)
        return place.with_suffix(".contract.json") if self.target == "gguf" else place / CONTRACT_FILE

    def copy_missing_from(self, old: Path, out: Path) -> None:
        """Copy this form from another export directory, if it is there and not in `out`."""
        for path in (self.path(old), old / f"Modelfile-{self.type}", self.contract_path(old)):
            target = out / path.name
            if path.is_dir() and not target.exists():
                link_or_copy_tree(path, target)
            elif path.is_file() and path.parent == old and not target.exists():
                shutil.copyfile(path, target)

    def __str__(self) -> str:
        return f"{self.target} {self.type}"
