"""What `auto` takes of a device's memory, on devices of many sizes; and what it says would need less."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from corral import recipe as recipes
from corral.recipe import Train
from corral.training import memory_estimate
from corral.training.memory_estimate import GB, DeviceKind, ModelShape
from corral.training.passes import MARGIN, Passes, choose_passes, longest_pack, savings

RECIPES = Path(__file__).parent.parent.parent / "recipes"
LLAMA_3B = ModelShape(28, 3072, 8192, 24, 8, 128, 128256, tied=True)
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied=False)
SMOL = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True)


def stage_of(name: str) -> tuple[Train, int]:
    recipe = recipes.load(RECIPES / f"{name}.toml", ())
    return recipe.train[0], recipe.data.max_length


def passes_for(
    shape: ModelShape, train: Train, max_length: int, gigabytes: float | None, device: DeviceKind = "cuda"
) -> Passes:
    """With as many rows of the greatest length as a step takes."""
    memory = None if gigabytes is None else int(gigabytes * GB)
    dtype = "bfloat16" if device == "cuda" else "float32"
    return choose_passes(shape, train, [max_length] * train.batch_size, device, dtype, memory)


@pytest.mark.parametrize(
    ("name", "shape", "gigabytes"),
    [("chat", LLAMA_3B, 8), ("llma-o", LLAMA_3B, 24), ("recipe-bot", LLAMA_3B, 15.7), ("harmless", LLAMA_8B, 24)],
)
def test_a_recipe_fits_the_device_that_its_reference_used(name: str, shape: ModelShape, gigabytes: float) -> None:
    train, max_length = stage_of(name)
    passes = passes_for(shape, train, max_length, gigabytes)
    assert passes.fits
    assert passes.estimate <= gigabytes * GB * (1 - MARGIN)
    assert passes.pack_length >= max_length


def test_more_memory_gives_passes_that_take_less_time() -> None:
    train, max_length = stage_of("chat")
    chosen = [passes_for(LLAMA_3B, train, max_length, size) for size in (6, 8, 16, 24, 80)]
    assert chosen[0].gradient_checkpointing
    assert (chosen[-1].pack_length, chosen[-1].gradient_checkpointing) == (8192, False)
    for less, more in pairwise(chosen):
        assert (less.gradient_checkpointing, -less.pack_length) >= (more.gradient_checkpointing, -more.pack_length)
    unknown = passes_for(LLAMA_3B, train, max_length, None)
    assert (unknown.pack_length, unknown.gradient_checkpointing) == (8192, False)


def test_a_device_that_is_too_small_gets_what_needs_least_and_is_said_to_be() -> None:
    passes = passes_for(LLAMA_8B, Train(), 2048, 8)
    assert not passes.fits
    assert (passes.pack_length, passes.gradient_checkpointing) == (2048, True)


def test_a_cpu_gets_short_packs_and_checkpointing_only_if_it_must() -> None:
    roomy, tight = (passes_for(SMOL, Train(), 512, size, "cpu") for size in (16, 1.5))
    assert (roomy.pack_length, roomy.gradient_checkpointing) == (512, False)
    assert (tight.pack_length, tight.gradient_checkpointing) == (512, True)
    assert tight.fits
    assert passes_for(SMOL, Train(), 1024, 16, "cpu").pack_length == 1024
    short = choose_passes(SMOL, Train(), [100] * 8, "cpu", "float32", None)
    assert short.pack_length == 512


def test_what_the_recipe_says_is_not_changed() -> None:
    for memory in (4, 80):
        train = Train(pack_length=3000, gradient_checkpointing=False)
        passes = passes_for(LLAMA_3B, train, 2048, memory)
        assert (passes.pack_length, passes.gradient_checkpointing) == (3000, False)
    assert passes_for(LLAMA_3B, Train(gradient_checkpointing=True), 512, 80).gradient_checkpointing
    assert passes_for(LLAMA_3B, Train(gradient_checkpointing=False), 512, 12).pack_length < 2048


def test_the_longest_pack_is_no_longer_than_a_step() -> None:
    assert longest_pack([5, 9, 7, 1], 2, 100) == 16
    assert longest_pack([5, 9, 7, 1], 4, 12) == 12
    assert longest_pack([50, 9], 2, 12) == 50
    assert longest_pack([], 2, 12) == 0


def test_settings_that_need_less_come_in_order_and_each_saves() -> None:
    train = Passes(8192, False, "bfloat16", 0, None).apply(Train(method="full"))
    tokens = {"pack_length": 8192}
    before, names = memory_estimate.memory(LLAMA_3B, train, 8192, 8192, "cuda", "bfloat16").peak, list[str]()
    for setting, changed in savings(train, 2, 512):
        tokens["pack_length"] = int(changed.pack_length)
        after = memory_estimate.memory(LLAMA_3B, changed, *[tokens["pack_length"]] * 2, "cuda", "bfloat16").peak
        assert after < before
        before = after
        names.append(setting)
    assert names == [
        "train.1.pack_length=2048",
        "train.1.gradient_checkpointing=true",
        "train.1.pack_length=512",
        "train.1.optimizer.kind=adamw_8bit",
        "train.1.method=lora",
        "train.1.quantization=nf4",
    ]
    least = Passes(512, True, "bfloat16", 0, None).apply(Train(quantization="nf4", optimizer={"kind": "adamw_8bit"}))  # pyright: ignore[reportArgumentType]
    assert list(savings(least, 1, 512)) == []


def test_passes_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert Passes.read(tmp_path) is None
    passes = Passes(1024, True, "float16", 5, 6, ("no kernel",))
    passes.write(tmp_path)
    assert Passes.read(tmp_path) == passes
    (tmp_path / "passes.json").write_text('{"pack_length": 3}')
    assert Passes.read(tmp_path) is None


def test_every_saving_is_a_setting_that_the_recipe_accepts() -> None:
    train: Any = Passes(8192, False, "bfloat16", 0, None).apply(Train())
    settings = [setting for setting, _ in savings(train, 1, 512)]
    text = 'name = "x"\nmodel.base = "x"\ndata = { max_length = 512, sources = [{ path = "x" }] }\ntrain = [{}]'
    parsed = recipes.parse(text, where="test", overrides=settings)
    assert (parsed.train[0].pack_length, parsed.train[0].quantization) == (512, "nf4")
