"""Adapters that vLLM would compute in part only are refused; this needs no vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from corral.engines.vllm_settings import lora_settings
from corral.errors import ModelError
from corral.model.loading import load_model
from tests.conftest import make_tiny_model
from tests.model.tiny import ADAPTER_KINDS, write_by_peft

COMPUTED = {"rslora", "one layer", "fan in, fan out"}


@pytest.mark.parametrize("kind", ADAPTER_KINDS)
def test_only_plain_lora_of_one_rank_and_scale_reaches_vllm(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # it has an environment of its own
    of_model, settings = ADAPTER_KINDS[kind]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make_tiny_model(300, **of_model).save_pretrained(base)
    write_by_peft(adapter, base, load_model(base), ids=[5, 6], **settings)
    if kind in COMPUTED:
        with pytest.raises(ModuleNotFoundError, match="vllm"):
            lora_settings([adapter])
        return
    with pytest.raises(ModelError, match="vLLM does not compute") as caught:
        lora_settings([adapter])
    assert f"corral merge {adapter} --out" in (caught.value.hint or "")
