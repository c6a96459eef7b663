"""What to change when a stage does not fit."""

from __future__ import annotations

from itertools import pairwise

import pytest

from corral import recipe as recipes
from corral.preflight.memory_estimate import DEVICES, ModelShape, PackShape
from corral.preflight.remedies import Remedy, find_remedies
from corral.preflight.workload import Workload
from corral.recipe import Train

LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)
LENGTHS = [300] * 90 + [1800] * 10


def remedies_for(train: Train, device: str, *, max_length: int = 2048, correction: int = 0) -> list[Remedy]:
    longest = PackShape(8192, 4000, 700)
    work = Workload(100, 10**6, 100, (0,), longest, (0,), longest, 1, 1000, (0,), 100, 1, 8192)
    of = DEVICES[device]
    return find_remedies(
        LLAMA_8B, train, 1, work, LENGTHS, max_length, of, of.dtype("auto"), int(of.memory * 0.8), correction
    )


def test_free_changes_come_first_and_the_list_ends_with_the_first_that_is_enough() -> None:
    remedies = remedies_for(Train(), "t4")
    assert remedies[0].settings == ("train.0.pack_length=4096",)
    keys = [remedy.settings[0].split("=")[0] for remedy in remedies]
    assert keys.index("train.0.gradient_checkpointing") < keys.index("train.0.quantization")
    assert [remedy.fits for remedy in remedies] == [False] * (len(remedies) - 1) + [True]
    assert all(later.memory < earlier.memory for earlier, later in pairwise(remedies))


def test_an_adapter_instead_of_full_training_comes_before_rounded_weights() -> None:
    keys = [remedy.settings[0] for remedy in remedies_for(Train(method="full"), "t4")]
    assert keys.index("train.0.optimizer.kind=adamw_8bit") < keys.index("train.0.method=lora")
    assert keys.index("train.0.method=lora") < keys.index("train.0.quantization=nf4")


def test_shorter_rows_come_late_and_say_how_many_are_lost() -> None:
    remedies = remedies_for(Train(), "t4", correction=8 * 10**9)
    shorter = [remedy for remedy in remedies if remedy.settings[0].startswith("data.max_length")]
    assert shorter[0].settings == ("data.max_length=1024", "train.0.pack_length=1024")
    assert shorter[0].cost.startswith("10.0%")
    assert "nf4" in remedies[remedies.index(shorter[0]) - 1].settings[0]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_recipe_accepts_every_change_together_with_those_before_it(method: str) -> None:
    settings: list[str] = []
    for remedy in remedies_for(Train.model_validate({"method": method}), "t4", correction=20 * 10**9):
        settings += remedy.settings
        text = 'name = "x"\nmodel.base = "x"\ndata = { max_length = 2048, sources = [{ path = "x" }] }\n'
        text += f'train = [{{ method = "{method}" }}]'
        recipes.parse(text, where="test", overrides=settings)
    assert len(settings) > 4
