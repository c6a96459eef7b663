"""A config says what its weights are, and the same to every version of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from corral.errors import ModelError
from corral.model import config as model_config
from corral.model.config import read_config, state_for_transformers_4
from corral.model.folder import check_folder
from corral.model.loading import load_model, load_template
from corral.model.merging import save_model
from tests.conftest import change_json, make_tiny_model


def save(folder: Path, *, tied: bool, head: str) -> Path:
    """A tiny model whose config says it is `tied`, with the `head` of another model, its embedding, or none."""
    make_tiny_model(400, tie_word_embeddings=False).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    embedding = weights["model.embed_tokens.weight"]
    heads = {"none": None, "equal": embedding.clone(), "rounded": embedding.half(), "other": embedding.flip(0)}
    if (weight := heads[head]) is not None:
        weights["lm_head.weight"] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    change_json(folder / "config.json", tie_word_embeddings=tied)
    return folder


@pytest.mark.parametrize(
    ("stated", "head", "tied"),
    [
        (True, "none", True),
        (True, "equal", True),
        (True, "rounded", False),
        (True, "other", False),
        (False, "equal", False),
        (False, "other", False),
    ],
)
def test_whether_the_head_is_the_embedding_is_decided_by_the_weights(
    stated: bool, head: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_config, "_ROWS", 64)
    folder = save(tmp_path, tied=stated, head=head)
    assert read_config(folder).tie_word_embeddings == tied
    model: Any = load_model(folder)
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    weights = load_file(folder / "model.safetensors")
    expected = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, expected.float())


def test_an_untied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the weights have no lm_head.weight") as caught:
        load_model(save(tmp_path, tied=False, head="none"))
    assert "set tie_word_embeddings to true" in (caught.value.hint or "")


def test_a_head_that_differs_is_written_with_a_config_that_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "base", tied=True, head="other")
    template, model = load_template(tiny_folder), load_model(folder)
    (tmp_path / "merged").mkdir()
    save_model(model, template, tmp_path / "merged", licences=(), weights=dict(model.named_parameters()))
    assert json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], load_file(folder / "model.safetensors")["lm_head.weight"])


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({"rope_type": "default"}, {"rope_scaling": None}),
    "linear": (
        {"rope_type": "linear", "factor": 2.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "yarn": (YARN, {"rope_scaling": YARN}),
    "longrope with a null": (
        LONGROPE | {"original_max_position_embeddings": 64, "factor": 4.0, "attention_factor": None},
        {
            "rope_scaling": LONGROPE
            | {
                "original_max_position_embeddings": 64,
                "factor": 4.0,
                "attention_factor": pytest.approx((4 / 3) ** 0.5),
            }
        },
    ),
    "longrope": (
        LONGROPE | {"original_max_position_embeddings": 64},
        {
            "original_max_position_embeddings": 64,
            # sqrt(1 + ln(256 / 64) / ln 64)
            "rope_scaling": LONGROPE
            | {"original_max_position_embeddings": 64, "attention_factor": pytest.approx((4 / 3) ** 0.5)},
        },
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_rotary_embedding_is_stated_as_each_version_of_transformers_reads_it(name: str, tmp_path: Path) -> None:
    rope, older = FORMS[name]
    model = make_tiny_model(400, rope_parameters={"rope_theta": 5e4, **rope}, max_position_embeddings=256)
    model.save_pretrained(tmp_path)
    state_for_transformers_4(tmp_path, model.config)
    written = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert written["rope_theta"] == 5e4
    assert written["rope_parameters"].items() >= {"rope_theta": 5e4, **rope}.items()
    assert {key: written[key] for key in older} == older
    check_folder(tmp_path)
    again = LlamaConfig.from_pretrained(tmp_path)
    assert again.rope_parameters is not None
    stated = {key: value for key, value in rope.items() if value is not None}
    assert again.rope_parameters.items() >= {"rope_theta": 5e4, **stated}.items()
