"""Memory limits, read from files as Linux lays them out."""

from __future__ import annotations

from pathlib import Path

from corral import system


def _cgroup(folder: Path, version: int, limit: str, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{'' if version == 2 else 'total_'}inactive_file {files}\n")


def test_the_lowest_limit_of_a_processs_cgroups_counts_without_its_page_cache(tmp_path: Path) -> None:
    listing = tmp_path / "cgroup"
    listing.write_text("0::/user/session\n")
    _cgroup(tmp_path / "user", 2, "8000", 3000, 500)
    _cgroup(tmp_path / "user/session", 2, "max", 100, 0)
    limits = list(system.cgroup_limits(tmp_path, listing))
    assert [(each.free, each.total) for each in limits] == [(5500, 8000)]


def test_cgroups_of_the_first_version_and_inside_a_container(tmp_path: Path) -> None:
    listing = tmp_path / "cgroup"
    listing.write_text("5:devices:/\n4:memory:/docker/abc\n")
    _cgroup(tmp_path / "memory", 1, "6000", 1000, 200)
    limits = list(system.cgroup_limits(tmp_path, listing))
    assert [(each.free, each.total) for each in limits] == [(5200, 6000)]
    _cgroup(tmp_path / "memory", 1, str(2**63 - 4096), 1000, 200)
    assert list(system.cgroup_limits(tmp_path, listing)) == []


def test_this_machine_has_memory() -> None:
    here = system.cpu_memory()
    assert here is not None
    assert 0 < here.free <= here.total
