"""The page about data names every format and every template there is."""

from __future__ import annotations

import re
from pathlib import Path

from corral.data.formats import FORMATS
from corral.template.template import shipped_templates

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")


def test_the_page_names_every_format() -> None:
    section = PAGE.partition("## What a row looks like")[2].partition("Any other columns")[0]
    named = set(re.findall(r"`([a-z0-9_-]+)`", section))
    assert FORMATS.keys() <= named, FORMATS.keys() - named


def test_the_page_names_every_template() -> None:
    named = set(re.findall(r"`([a-z0-9.-]+)`", PAGE.partition("## Templates")[2]))
    assert shipped_templates().keys() <= named, shipped_templates().keys() - named
