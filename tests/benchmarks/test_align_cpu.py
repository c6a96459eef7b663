"""What the benchmark of preferences claims from its figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def align_cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("align_cpu")


def measured(align_cpu: Any, sft: float) -> dict[str, dict[str, Any]]:
    """Figures of all sides: TRL's fastest form is not its leanest."""
    speeds = {"trl-1": 90.0, "trl-2": 100.0, "trl-4": 80.0, "trl-live": 95.0, "sft-trl": 100.0}
    sides: dict[str, dict[str, Any]] = {}
    for side in align_cpu.SIDES:
        ours = sft if side.startswith("sft") else 240.0
        sides[side] = {"tokens_per_second": speeds.get(side, ours), "peak_memory_bytes": 4e9, "losses": [0.69, 0.5]}
    sides["trl-1"]["peak_memory_bytes"] = 3e9
    sides["trl-1"]["losses"] = [0.69, 0.5002]
    sides["corral-again"]["peak_memory_bytes"] = 1.5e9
    sides["corral"]["peak_memory_bytes"] = sides["corral-last"]["peak_memory_bytes"] = 1.2e9
    sides["checkpointed-trl"]["peak_memory_bytes"] = 2e9
    sides["checkpointed-corral"]["peak_memory_bytes"] = 1.5e9
    return sides


def test_speed_is_held_against_trls_fastest_form_and_memory_against_its_leanest(align_cpu: Any) -> None:
    speed, memory, checkpointed, gap = align_cpu.make_claims(measured(align_cpu, sft=190.0))
    assert (speed.name, speed.value) == ("dpo_speed_vs_trl", pytest.approx(2.4))
    assert (memory.name, memory.value) == ("dpo_memory_vs_trl", pytest.approx(0.5))
    assert (checkpointed.name, checkpointed.value) == ("dpo_checkpointed_memory_vs_trl", pytest.approx(0.75))
    assert (gap.name, gap.value) == ("dpo_loss_gap", pytest.approx(2e-4))


@pytest.mark.parametrize(("full_width", "goal"), [(True, 3), (False, 2.28)])
def test_the_goal_for_speed_is_three_where_avx512_has_its_full_width(
    align_cpu: Any, monkeypatch: pytest.MonkeyPatch, full_width: bool, goal: float
) -> None:
    monkeypatch.setattr(align_cpu.claims, "has_full_width_avx512", lambda: full_width)
    assert align_cpu.make_claims(measured(align_cpu, sft=190.0))[0].goal == goal


@pytest.mark.parametrize(
    ("vendor", "flags", "full"),
    [
        ("GenuineIntel", "avx2 avx512f", True),
        ("GenuineIntel", "avx2", False),
        ("AuthenticAMD", "avx512f avx512_vp2intersect", True),
        ("AuthenticAMD", "avx512f", False),
    ],
)
def test_the_width_of_avx512_is_known_by_vendor_and_flags(
    align_cpu: Any, monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, full: bool
) -> None:
    fields = {"vendor_id": vendor, "flags": flags}
    monkeypatch.setattr(align_cpu.claims, "_cpu_field", lambda name: fields[name])
    assert align_cpu.claims.has_full_width_avx512() is full
