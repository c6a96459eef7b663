"""An OpenVINO export is one model to OpenVINO and to OpenVINO GenAI, without corral's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from corral.export.contract import ACROSS_ENGINES
from corral.export.export import export_form
from corral.export_forms import OPENVINO_MODEL, ExportForm
from corral.progress import Progress
from tests.consumers.cases import CHATS, Case

FORM = ExportForm("openvino", "f32")
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def logprobs(folder: Path, ids: list[int]) -> list[float]:
    import openvino

    request = openvino.Core().compile_model(folder / OPENVINO_MODEL, "CPU", SETTINGS).create_infer_request()
    positions = np.arange(len(ids))[None]
    inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones_like(positions), "position_ids": positions}
    result = request.infer(inputs | {"beam_idx": np.zeros(1, np.int32)})
    scores = torch.tensor(result["logits"])[0, :-1].log_softmax(-1)
    return scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("heads", ["tied", "untied"])
@pytest.mark.parametrize("rope", ["default", "linear", "yarn", "llama3"])
def test_an_openvino_form_is_the_same_model(rope: str, heads: str, cases: dict[str, Case], tmp_path: Path) -> None:
    genai: Any = pytest.importorskip("openvino_genai")
    case = cases[f"{rope}, {heads}"]
    folder = export_form(case.folder, tmp_path, FORM, Progress())
    gaps = np.abs(np.subtract(logprobs(folder, case.ids), case.logprobs))
    assert gaps.mean() < ACROSS_ENGINES.mean
    assert gaps.max() < ACROSS_ENGINES.largest
    pipeline = genai.LLMPipeline(folder, "CPU", SETTINGS)
    tokenizer, settings = pipeline.get_tokenizer(), pipeline.get_generation_config()
    settings.max_new_tokens, settings.apply_chat_template = 24, False
    for chat, prompt, answer in zip(CHATS, case.prompts, case.answers, strict=True):
        text = tokenizer.apply_chat_template(chat.to_json()["messages"], add_generation_prompt=True)
        inputs = tokenizer.encode(text, add_special_tokens=False)
        assert inputs.input_ids.data[0].tolist() == prompt
        assert pipeline.generate(inputs, settings).tokens == [answer]
