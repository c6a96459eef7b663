"""The reason a format gives for refusing a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from corral.data.formats import FormatError


def reason(function: Callable[[Mapping[str, Any]], Any], row: Mapping[str, Any]) -> str:
    with pytest.raises(FormatError) as caught:
        function(row)
    return caught.value.reason
