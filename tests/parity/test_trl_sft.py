"""The first steps of supervised fine-tuning equal those of TRL's SFTTrainer: same rows, same adapter, same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from corral.model import adapters
from corral.recipe import Lora, Optimizer, Train
from corral.training.sampler import BatchSampler
from tests.conftest import make_tiny_model
from tests.training.tiny import make_trainer

STEPS, BATCH, LR = 6, 4, 2e-3


def ours(encoded: list[Any], vocabulary: int, folder: Path) -> tuple[list[float], list[float], dict[str, Any]]:
    model = adapters.attach(make_tiny_model(vocabulary), Lora(rank=4, alpha=8), seed=1)
    config = Train(steps=STEPS, batch_size=BATCH, optimizer=Optimizer(lr=LR, schedule="constant", warmup_ratio=0))
    trainer = make_trainer(model, encoded, config, folder, held_out=0, seed=0)
    log: list[Any] = []
    trainer.run(on_step=log.append)
    return [m.loss for m in log], [m.grad_norm for m in log], dict(trainer.parameters)


def plain_peft(vocabulary: int) -> Any:
    """The same adapter with the same first weights, computed by PEFT and transformers alone."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = make_tiny_model(vocabulary)
    torch.manual_seed(1)
    return get_peft_model(model, lora)


def theirs(
    encoded: list[Any], vocabulary: int, tokenizer: Any, folder: Path
) -> tuple[list[float], list[float], dict[str, Any]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps = BatchSampler(Train(steps=STEPS, batch_size=BATCH), [1] * len(encoded), 0)
    order = [i for step in range(1, STEPS + 1) for i in steps.batch(step)]
    rows = [{"input_ids": list(encoded[i].ids), "completion_mask": [int(t) for t in encoded[i].trained]} for i in order]
    log: list[dict[str, float]] = []

    class Exact(SFTTrainer):
        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            log.append(dict(logs))
            super().log(logs, *args, **kwargs)

    trainer = Exact(
        model=plain_peft(vocabulary),
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            completion_only_loss=True,
            max_length=None,
            learning_rate=LR,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    steps = [entry for entry in log if "loss" in entry]
    parameters = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return [s["loss"] for s in steps], [float(s["grad_norm"]) for s in steps], parameters


def test_losses_gradients_and_weights_equal_trl(encoded_rows: list[Any], tiny_tokenizer: Any, tmp_path: Path) -> None:
    vocabulary = len(tiny_tokenizer)
    our_losses, our_norms, our_weights = ours(encoded_rows, vocabulary, tmp_path / "ours")
    their_losses, their_norms, their_weights = theirs(encoded_rows, vocabulary, tiny_tokenizer, tmp_path / "theirs")
    assert our_losses == pytest.approx(their_losses, rel=1e-3)
    assert our_norms == pytest.approx(their_norms, rel=1e-3)
    assert our_losses[-1] < our_losses[0]
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        torch.testing.assert_close(weight, their_weights[name], rtol=5e-3, atol=5e-4)
