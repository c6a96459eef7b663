"""One server for all tests of a module."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from corral.template import Template
from tests.clients.server import every_route
from tests.serving.conftest import RunningServer, tiny_template

__all__ = ["tiny_template"]


@pytest.fixture(scope="module")
def server(tiny_template: Template) -> Generator[RunningServer]:
    with every_route(tiny_template) as running:
        yield running
