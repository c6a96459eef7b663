"""Engines with one model and several adapters: whose turn it is, and which adapter is on."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from corral.engines.shared_model import SharedModel
from tests.conftest import make_tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model() -> Any:
    """A model with two adapters that change it, on different layers."""
    adapted: Any = get_peft_model(make_tiny_model(400), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.add_adapter("other", LoraConfig(r=4, target_modules=["down_proj"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return adapted.eval()


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model.get_base_model()(IDS).logits


def test_in_a_turn_the_adapter_asked_for_is_on_and_no_other(model: Any) -> None:
    with torch.no_grad(), model.disable_adapter():
        expected = {None: logits(model)}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = logits(model)
    shared = SharedModel(model)
    outputs = []
    for name in (None, "default", "other", "default", None, "other", None, "default", "default"):
        with shared.use(name):
            outputs.append((name, logits(model)))
    for name, values in outputs:
        torch.testing.assert_close(values, expected[name], rtol=0, atol=0)
    assert not torch.allclose(expected[None], expected["default"])
    assert not torch.allclose(expected["other"], expected["default"])


def test_who_waits_longest_is_next_also_after_one_who_comes_again_at_once(model: Any) -> None:
    shared = SharedModel(model)
    order: list[str] = []
    inside = threading.Event()

    def busy() -> None:
        for _ in range(3):
            with shared.use("default"):
                inside.set()
                time.sleep(0.05)
                order.append("busy")

    def patient(name: str) -> None:
        with shared.use("other"):
            order.append(name)

    threads = [threading.Thread(target=busy)]
    threads[0].start()
    assert inside.wait(30)
    for name in ("first", "second"):
        threads.append(threading.Thread(target=patient, args=(name,)))
        threads[-1].start()
        time.sleep(0.01)
    for thread in threads:
        thread.join(30)
    assert order == ["busy", "first", "second", "busy", "busy"]


def test_a_turn_that_fails_is_given_back(model: Any) -> None:
    shared = SharedModel(model)
    with pytest.raises(ZeroDivisionError), shared.use("default"):
        raise ZeroDivisionError
    with shared.use(None):
        pass
