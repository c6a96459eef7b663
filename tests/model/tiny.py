"""Tiny models with adapters, and what plain transformers and PEFT compute with them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from corral.model import packed_forward
from tests.conftest import make_tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def random_sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 300, (n,), generator=generator).tolist() for n in lengths]


def with_adapter(targets: Sequence[str], model: Any = None, **settings: Any) -> Any:
    """The tiny model, or another, with an adapter of PEFT's that changes it; with the same weights each time."""
    model = make_tiny_model(300) if model is None else model
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False} | settings
    return get_peft_model(model, LoraConfig(target_modules=list(targets), **settings))


TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True, "mlp_bias": True}
ADAPTER_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: settings of the model, settings of PEFT's adapter on q and v
    "rslora": ({}, {"use_rslora": True}),
    "dora": ({}, {"use_dora": True}),
    "patterns": ({}, {"rank_pattern": {"layers.1.self_attn.q_proj": 8}, "alpha_pattern": {"v_proj": 2}}),
    "one layer": ({}, {"layers_to_transform": [1]}),
    "fan in, fan out": ({}, {"fan_in_fan_out": True}),
    "lora bias": (BIASED, {"lora_bias": True}),
    "all biases": (BIASED, {"bias": "all"}),
    "biases of its layers": (BIASED, {"bias": "lora_only"}),
    "parameters": (TIED, {"target_parameters": ["mlp.up_proj.weight", "self_attn.o_proj.weight"]}),
    "a part of the base": ({}, {"init_lora_weights": "olora"}),
    "whole modules": (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "whole embedding": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "whole head": (TIED, {"modules_to_save": ["lm_head"]}),
    "whole norms": ({}, {"modules_to_save": ["norm"]}),
    "tokens": (TIED, {"trainable_token_indices": [3, 5]}),
    "tokens of both": (TIED, {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}}),
    "head": ({}, {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": (TIED, {"target_modules": ["q_proj", "lm_head"]}),
    "tied head with dora": (TIED, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "tied embedding": (TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
    "both, tied": (TIED, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "resized": (TIED, {"resize": 303}),
    "resized whole modules": ({}, {"resize": 303, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized tokens": (TIED, {"resize": 303, "trainable_token_indices": [301, 302]}),
    "shrunk": ({}, {"resize": 290}),
}
"""Adapters that PEFT writes and corral loads."""


def write_by_peft(
    folder: Path, base: Path, model: Any, *, resize: int | None = None, ids: Sequence[int], **settings: Any
) -> list[float]:
    """Write an adapter of a model, with every trained weight changed. Returns: PEFT's own log-probabilities of ids[1:].

    Args:
        folder: to write it into.
        base: the model's folder.
        model: the model.
        resize: the size of the vocabulary that it is trained on.
        settings: of LoraConfig.
    """
    torch.manual_seed(3)
    if resize:
        model.resize_token_embeddings(resize)
    settings = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape))
        adapted.peft_config["default"].base_model_name_or_path = str(base)
        adapted.save_pretrained(str(folder))
    with torch.no_grad():
        return plain_logprobs(adapted.eval(), ids).tolist()


def fill_lora_b(model: Any, size: float) -> Any:
    """Draw every B anew: fresh adapters change nothing, these do."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    return model


def remove_replaced_forwards(model: Any) -> Any:
    """Give every module the forward that its library has for it."""
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model


def layers_with_replaced_forwards(model: Any) -> set[str]:
    """Names of the layers with an adapter whose forward is not PEFT's own."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    return {n.rpartition(".")[2] for n, m in layers.items() if "forward" in vars(m)}


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Of `IDS`."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), gradients(model)


def packed_losses_and_gradients(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of all sequences in one pack: the log-probability of each token, and the gradients of their mean."""
    model.zero_grad()
    losses = torch.cat(packed_forward.target_logprobs(model, sequences, [range(1, len(s)) for s in sequences]))
    losses.mean().backward()
    return losses.detach(), gradients(model)


def plain_logprobs(model: Any, ids: Sequence[int]) -> Tensor:
    """[length − 1]: the log-probability of each token by the model's own forward, alone in its batch."""
    row = torch.tensor([ids], device=model.device)
    logits = model(input_ids=row, use_cache=False).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, row[0, 1:, None]).squeeze(1)


def plain_losses_and_gradients(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The same as `packed_losses_and_gradients`, sequence by sequence."""
    model.zero_grad()
    losses = torch.cat([plain_logprobs(model, s) for s in sequences])
    losses.mean().backward()
    return losses.detach(), gradients(model)


def assert_gradients_equal(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = 1e-3, atol: float = 2e-5
) -> None:
    """Assert that gradients differ by `rtol`, or by `atol` of the largest element of their tensor, at most."""
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = atol * gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, rtol=rtol, atol=limit, msg=lambda m, n=name: f"{n}: {m}")
