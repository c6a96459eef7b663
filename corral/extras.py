"""Imports optional packages, or names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any

from corral.errors import MissingExtraError


def require(module: str, extra: str) -> Any:
    """Import a module of an optional package.

    Raises:
        MissingExtraError: the module, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the package {error.name!r} is not installed", hint=f'pip install "corral[{extra}]"'
        ) from None
