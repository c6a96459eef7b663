"""README's table of claims is the content of `benchmarks/results/`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| ([\d.e-]+)([^|]*) \| ([<>]=) ([\d.]+) \|$", re.M)


def measured_claims() -> dict[str, dict[str, Any]]:
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    claims = [claim for file in files for claim in json.loads(file.read_text("utf-8"))["claims"]]
    return {claim["name"]: claim for claim in claims if claim["value"] is not None}


def test_the_readme_has_every_measured_claim_with_its_value_in_three_digits_and_its_goal() -> None:
    table = (ROOT / "README.md").read_text("utf-8").partition("| claim |")[2].partition("\n\n")[0]
    rows = {name: (float(value), sign, float(goal)) for name, value, _, sign, goal in ROW.findall(table)}
    assert len(rows) == table.count("| `") >= 20
    assert rows == {
        name: (float(f"{claim['value']:.3g}"), claim["direction"], claim["goal"])
        for name, claim in measured_claims().items()
    }


def test_the_readme_says_which_claims_are_not_met() -> None:
    rows = ROW.findall((ROOT / "README.md").read_text("utf-8"))
    not_met = {name for name, _, unit, _, _ in rows if unit.endswith(", not met")}
    assert not_met == {name for name, claim in measured_claims().items() if not claim["met"]}
