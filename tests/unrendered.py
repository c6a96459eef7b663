"""Reports whose pictures are filled but not turned into pixels, which takes half the time of a run of the tiny recipe.

For tests of other things; those of `corral.report` and the finished run that tests share have real pictures.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from corral.report import plots


def picture(draw: Callable[[Figure], None], *, height: float) -> bytes:
    """Takes the place of `plots._picture`: one white pixel, after the figure was filled."""
    module: Any = plots
    with matplotlib.rc_context(module._STYLE):
        draw(Figure(figsize=(plots.WIDTH_INCHES, height), layout="constrained"))
    out = io.BytesIO()
    Image.new("1", (1, 1), 1).save(out, "PNG")
    return out.getvalue()
