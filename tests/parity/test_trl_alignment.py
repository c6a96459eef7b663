"""Losses, gradients and weights of two steps equal those of TRL's trainers: same pairs or scored answers, same adapter.

Each step is one micro-batch, as TRL's KTO takes its KL per micro-batch. TRL's ORPO counts prompts in its likelihood term too:
the prompts here are one token, which nothing predicts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corral.data.example_store import Example
from corral.model import adapters
from corral.recipe import Lora, Optimizer, Train
from corral.template import Encoded
from tests.conftest import make_tiny_model
from tests.training.tiny import make_examples, make_trainer

VOCABULARY, LR = 300, 1e-2
TokenIds = list[list[int]]


def make_rows() -> list[Encoded]:
    """Answers of 5 to 40 tokens to different prompts of one token."""
    generator = torch.Generator().manual_seed(2)
    rows: list[Encoded] = []
    for prompt, length in enumerate((12, 40, 7, 23, 5, 31, 18, 9), start=3):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Encoded((prompt, *ids), (False, *[True] * length)))
    return rows


def make_model() -> Any:
    """A model with a fresh adapter, which is the reference; TRL keeps a copy of it as that."""
    return adapters.attach(make_tiny_model(VOCABULARY), Lora(rank=4, alpha=8), seed=1)


def move_away(model: Any) -> Any:
    """Change the adapter that is trained, as some steps would."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def ours(objective: str, settings: dict[str, Any], folder: Path) -> tuple[list[float], list[dict[str, Tensor]], Any]:
    """Losses and gradients of two steps on all rows, and the examples."""
    optimizer = Optimizer(lr=LR, schedule="constant", warmup_ratio=0, clip=1e9)
    config = Train.model_validate(
        {"objective": objective, objective: settings, "steps": 2, "batch_size": 8, "optimizer": optimizer}
    )
    model = make_model()
    trainer = make_trainer(model, make_rows(), config, folder, held_out=0)
    trainer.prepare_reference()
    move_away(model)
    losses, gradients = list[float](), list[dict[str, Tensor]]()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in trainer.parameters.items()})
    )
    trainer.run(on_step=lambda metrics: losses.append(metrics.loss or 0.0))
    return losses, gradients, trainer.examples


def theirs(loss_of: Callable[[Any], Tensor], model: Any) -> tuple[list[float], list[dict[str, Tensor]]]:
    """Two steps of AdamW on a loss."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    losses, gradients = list[float](), list[dict[str, Tensor]]()
    move_away(model)
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    return losses, gradients


def split_ids(sequence: Encoded) -> tuple[list[int], list[int]]:
    return list(sequence.ids[:1]), list(sequence.ids[1:])


def arguments(config: type[Any], folder: Path, **settings: Any) -> Any:
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        "report_to": [],
        "disable_tqdm": True,
    }
    return config(**common, **settings)


def dpo_loss(folder: Path, tokenizer: Any, examples: Sequence[Example], **settings: Any) -> tuple[Any, Any]:
    """(a function from the model to its loss, the model) of TRL's DPOTrainer."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8)
    trainer = DPOTrainer(
        model=make_model(),
        args=arguments(DPOConfig, folder, **settings),
        train_dataset=text,
        processing_class=tokenizer,
    )
    rows: list[dict[str, list[int]]] = []
    for example in examples:
        (prompt, chosen), (_, rejected) = map(split_ids, example.sequences)
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    batch = trainer.data_collator(rows)
    return lambda model: trainer._compute_loss(model.train(), batch, False), trainer.model


def kto_loss(folder: Path, tokenizer: Any, examples: Sequence[Example], **settings: Any) -> tuple[Any, Any]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    text = Dataset.from_list([{"prompt": "a", "completion": "b", "label": i % 2 == 0} for i in range(8)])
    trainer = KTOTrainer(
        model=make_model(),
        args=arguments(KTOConfig, folder, **settings),
        train_dataset=text,
        processing_class=tokenizer,
    )
    rows: list[dict[str, Any]] = []
    answers = [split_ids(example.sequences[0]) for example in examples]
    for i, example in enumerate(examples):
        record: Any = example.record
        rows.append(
            {
                "prompt_ids": answers[i][0],
                "completion_ids": answers[i][1],
                "KL_completion_ids": answers[i - 1][1],
                "label": record.score > 0.5,
            }
        )
    batch = trainer.data_collator(rows)
    return lambda model: trainer._compute_loss(model.train(), batch, False), trainer.model


def reference_free_loss(
    trainer_type: type[Any],
    config: type[Any],
    folder: Path,
    tokenizer: Any,
    examples: Sequence[Example],
    **settings: Any,
) -> tuple[Any, Any]:
    """Of TRL's ORPOTrainer or CPOTrainer."""
    from datasets import Dataset

    trainer = trainer_type(
        model=make_model(),
        args=arguments(config, folder, **settings),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 8),
        processing_class=tokenizer,
    )
    batch: dict[str, Tensor] = {}
    for name, number in (("chosen", 0), ("rejected", 1)):
        sequences = [example.sequences[number] for example in examples]
        longest = max(len(s.ids) for s in sequences)

        def pad(values: list[list[int]], filler: int, longest: int = longest) -> Tensor:
            return torch.tensor([v + [filler] * (longest - len(v)) for v in values])

        batch[f"{name}_input_ids"] = pad([list(s.ids) for s in sequences], 0)
        batch[f"{name}_attention_mask"] = pad([[1] * len(s.ids) for s in sequences], 0)
        batch[f"{name}_labels"] = pad([[-100, *s.ids[1:]] for s in sequences], -100)
    prompts = torch.tensor([[example.sequences[0].ids[0]] for example in examples])
    batch |= {"prompt_input_ids": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    return lambda model: trainer.get_batch_loss_metrics(model.train(), batch)[0], trainer.model


def orpo_loss(*args: Any, **settings: Any) -> tuple[Any, Any]:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    return reference_free_loss(ORPOTrainer, ORPOConfig, *args, **settings)


def simpo_loss(*args: Any, **settings: Any) -> tuple[Any, Any]:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return reference_free_loss(CPOTrainer, CPOConfig, *args, loss_type="simpo", cpo_alpha=0.0, **settings)


CASES: dict[str, tuple[str, dict[str, Any], Callable[..., tuple[Any, Any]], dict[str, Any]]] = {
    # objective, our settings, TRL's trainer, its settings
    "dpo": ("dpo", {"sft_weight": 0.0}, dpo_loss, {"beta": 0.1}),
    "dpo with the likelihood of chosen answers": (
        "dpo",
        {"beta": 0.3, "sft_weight": 0.2},
        dpo_loss,
        {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ),
    "dpo, normalised by length": (
        "dpo",
        {"beta": 5.0, "normalise": True, "sft_weight": 0.0},
        dpo_loss,
        {"beta": 5.0, "loss_type": "sigmoid_norm"},
    ),
    "ipo": ("ipo", {"beta": 0.2}, dpo_loss, {"beta": 0.2, "loss_type": "ipo"}),
    "kto": (
        "kto",
        {"beta": 0.2, "desirable_weight": 1.5},
        kto_loss,
        {"beta": 0.2, "desirable_weight": 1.5},
    ),
    "orpo": ("orpo", {"odds_weight": 0.4}, orpo_loss, {"beta": 0.4}),
    "simpo": ("simpo", {"beta": 2.5, "margin": 1.4}, simpo_loss, {"beta": 2.5, "simpo_gamma": 1.4}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_two_steps_equal_those_of_trl(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    objective, our_settings, trl_loss, their_settings = CASES[name]
    our_losses, our_gradients, examples = ours(objective, our_settings, tmp_path / "ours")
    rows = make_examples(make_rows(), objective)
    loss_of, model = trl_loss(tmp_path / "theirs", tiny_tokenizer, rows, **their_settings)
    their_losses, their_gradients = theirs(loss_of, model)
    assert len(examples) == len(rows)
    assert our_losses == pytest.approx(their_losses, rel=1e-4)
    assert our_losses[0] != pytest.approx(our_losses[1], rel=1e-2), (
        "the second step differs, so it is a test of its own"
    )
    for step, (our, their) in enumerate(zip(our_gradients, their_gradients, strict=True)):
        assert our.keys() == their.keys()
        for parameter, value in their.items():
            limit = (1e-4, 5e-3)[step] * float(value.abs().max())
            torch.testing.assert_close(
                our[parameter], value, rtol=1e-2, atol=limit, msg=lambda m, p=parameter: f"{p}: {m}"
            )
