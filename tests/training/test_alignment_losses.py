"""Preference objectives: their formulas, written out once more, and denominators that are those of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from corral.messages import Feedback
from corral.model.packed_forward import target_logprobs
from corral.training.alignment_losses import log_odds
from corral.training.loop import Evaluation, Trainer
from corral.training.scorer import ALL
from tests.model.tiny import fill_lora_b, plain_logprobs

OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"objective": "dpo"},
    "dpo, normalised": {"objective": "dpo", "dpo": {"normalise": True, "beta": 5.0, "sft_weight": 0.0}},
    "ipo": {"objective": "ipo"},
    "kto": {"objective": "kto", "kto": {"undesirable_weight": 1.5}},
    "orpo": {"objective": "orpo"},
    "simpo": {"objective": "simpo"},
    "ulma": {"objective": "ulma"},
    "ulma, continuous": {"objective": "ulma", "ulma": {"continuous": True, "normalise": True, "c": 0.3}},
}


def trained_away(trainer: Trainer) -> Trainer:
    """The trainer with its reference computed, and then an adapter that differs from it."""
    trainer.prepare_reference()
    fill_lora_b(trainer.model, 0.1)
    return trainer


def measure(trainer: Trainer, size: int = 10) -> tuple[Evaluation, dict[str, Tensor]]:
    """The objective and its gradient over the first rows."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.config = trainer.config.model_copy(
        update={"optimizer": trainer.config.optimizer.model_copy(update={"clip": 1e9})}
    )
    result, _ = trainer._compute_gradients([trainer.examples[i] for i in range(size)], 1.0)
    return result, {name: p.grad.clone() for name, p in trainer.parameters.items()}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut_into_passes(
    name: str, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    packed, alone = (
        trained_away(tiny_trainer(tmp_path / str(length), pack_length=length, held_out=2, **OBJECTIVES[name]))
        for length in (4096, 1)
    )
    (one, gradient), (other, expected) = measure(packed), measure(alone)
    assert one.loss == pytest.approx(other.loss, rel=1e-4)
    assert one.metrics.keys() == other.metrics.keys()
    for metric, value in other.metrics.items():
        assert one.metrics[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), metric
    for parameter, value in expected.items():
        torch.testing.assert_close(gradient[parameter], value, rtol=2e-3, atol=2e-4 * float(value.abs().max()))


def test_ulma_is_the_authors_formula_with_means_over_the_step(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    """l = mean log-prob of a token: −mean over positives of l + mean over negatives of −log σ(−β (l − l_ref) − c)."""
    beta, c = 0.7, 0.2
    settings = {"objective": "ulma", "ulma": {"beta": beta, "c": c, "normalise": True}}
    trainer = trained_away(tiny_trainer(tmp_path, pack_length=110, held_out=0, **settings))
    result, gradient = measure(trainer)
    model, positives, negatives = trainer.model, [], []
    for example in [trainer.examples[i] for i in range(10)]:
        (sequence,) = example.sequences
        start = sequence.trained.index(True)
        mask = torch.tensor(sequence.trained[1:])

        def mean_logprob(ids: Any = sequence.ids, mask: Tensor = mask) -> Tensor:
            return (plain_logprobs(model, ids) * mask).sum() / mask.sum()

        assert start > 0
        assert isinstance(example.record, Feedback)
        if example.record.score > 0.5:
            positives.append(-mean_logprob())
            continue
        with model.disable_adapter(), torch.no_grad():
            reference = mean_logprob()
        negatives.append(torch.nn.functional.softplus(beta * (mean_logprob() - reference) + c))
    assert (len(positives), len(negatives)) == (7, 3)
    loss = torch.stack(positives).mean() + torch.stack(negatives).mean()
    trainer.optimizer.zero_grad()
    loss.backward()
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in trainer.parameters.items():
        torch.testing.assert_close(
            gradient[name], parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max())
        )


@pytest.mark.parametrize(("score", "class_"), [(0.9, "chosen"), (0.2, "rejected")])
def test_a_step_with_one_class_only_has_no_term_and_no_metric_of_the_other(
    score: float, class_: str, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = trained_away(tiny_trainer(tmp_path, held_out=0, objective="ulma"))
    batch = [e for e in trainer.examples if isinstance(e.record, Feedback) and e.record.score == score][:4]
    result, norm = trainer._compute_gradients(batch, 1.0)
    assert math.isfinite(result.loss)
    assert norm > 0
    other = {"chosen": "rejected", "rejected": "chosen"}[class_]
    assert {f"reward_{class_}", f"logprob_{class_}"} <= result.metrics.keys()
    assert not result.metrics.keys() & {f"reward_{other}", f"logprob_{other}", "reward_margin"}


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto"])
def test_at_the_reference_rewards_are_zero_and_the_loss_is_known(
    objective: str, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, objective=objective)
    trainer.prepare_reference()
    result = trainer.evaluate()
    expected = {"dpo": math.log(2), "ipo": (1 / 0.2) ** 2, "kto": 0.5}[objective]
    assert result.metrics.get("preference_loss", result.loss) == pytest.approx(expected, rel=1e-4)
    assert result.metrics["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert result.metrics.get("kl", 0.0) == pytest.approx(0, abs=1e-3)


def test_training_on_pairs_moves_the_margin_up_and_metrics_of_both_sides_are_written(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    lines: list[Any] = []
    tiny_trainer(tmp_path, objective="dpo", steps=12).run(on_step=lines.append)
    first, last = lines[0].objective, lines[-1].objective
    assert first["eval_reward_margin"] == pytest.approx(0, abs=1e-4)
    assert last["reward_margin"] > 0.05
    assert last["reward_accuracy"] > 0.7
    assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-5)
    assert {"eval_logprob_chosen", "eval_logprob_rejected"} <= last.keys()


def test_kto_takes_its_kl_from_each_prompt_with_the_answer_of_the_row_before(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = trained_away(tiny_trainer(tmp_path, held_out=0, objective="kto"))
    rows = trainer.examples
    ratios: list[float] = []
    for i in range(6):
        own, before = rows[i].sequences[0], rows[i - 1].sequences[0]
        end, start = own.trained.index(True), before.trained.index(True)
        ids = (own.ids[:end] + before.ids[start:])[: max(len(own.ids), len(before.ids))]
        trained = (own.trained[:end] + before.trained[start:])[: len(ids)]
        positions = [p for p, flag in enumerate(trained) if flag]
        with torch.no_grad():
            (policy,) = target_logprobs(trainer.model, [ids], [positions])
            with trainer.model.disable_adapter():
                (reference,) = target_logprobs(trainer.model, [ids], [positions])
        ratios.append(float(policy.sum() - reference.sum()))
    batch = [rows[i] for i in range(6)]
    assert trainer._statistic(batch) == pytest.approx(sum(ratios) / 6, rel=1e-4)
    kl = trainer._compute_gradients(batch, 1.0)[0].metrics["kl"]
    assert kl == pytest.approx(max(0.0, sum(ratios) / 6), rel=1e-4)


def test_log_odds_and_their_slopes_are_exact_near_zero_and_one() -> None:
    values = torch.tensor([-1e-6, -0.1, -0.7, -5.0, -80.0], dtype=torch.float32, requires_grad=True)
    odds = log_odds(values)
    odds.sum().backward()
    assert values.grad is not None
    for value, result, slope in zip(values.tolist(), odds.tolist(), values.grad.tolist(), strict=True):
        assert result == pytest.approx(value - math.log(-math.expm1(value)), rel=1e-5)
        assert slope == pytest.approx(1 / -math.expm1(value), rel=1e-5)


def test_a_reference_of_a_score_is_that_of_its_own_sequences(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, objective="kto", held_out=0)
    trainer.prepare_reference()
    example: Any = trainer.examples[3]
    example = replace(example, reference=(1.0, 2.0))
    assert [trainer.scorer.score([example], part)[0].reference for part in (slice(-1), slice(-1, None), ALL)] == [
        (1.0,),
        (2.0,),
        (1.0, 2.0),
    ]


def test_the_odds_of_a_certain_answer_are_finite_and_so_is_their_slope() -> None:
    certain = torch.zeros(2, requires_grad=True)
    odds = log_odds(certain)
    odds.sum().backward()  # pyright: ignore[reportUnknownMemberType]
    assert odds.isfinite().all()
    assert certain.grad is not None
    assert certain.grad.isfinite().all()
