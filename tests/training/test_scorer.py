"""How examples are scored in packed passes: what is computed, and that it is what each sequence gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from corral.data.example_store import Example
from corral.model.compute.cpu_matmul import padding_rows
from corral.model.greedy import GreedyAnswer
from corral.model.packed_forward import target_logprobs
from corral.training import scorer as scorer_module
from corral.training.loop import Trainer
from corral.training.objectives import trained_positions
from corral.training.scorer import ALL, Scorer, token_count


def computed_tokens(trainer: Trainer, examples: Sequence[Example]) -> int:
    """Tokens that one pass over the examples sends through the model."""
    counts: list[int] = []
    embedding: Any = trainer.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    trainer.scorer.score(list(examples))
    hook.remove()
    (count,) = counts
    return count


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_prompt_of_a_pair_is_computed_once(
    objective: str, tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, objective=objective)
    examples = trainer.examples[:2]
    beginnings = {tuple(s.ids[: i + 1]) for e in examples for s in e.sequences for i in range(len(s.ids))}
    assert computed_tokens(trainer, examples) == len(beginnings) + padding_rows(len(beginnings), 64)
    assert len(beginnings) < sum(map(token_count, examples))


def test_many_prompts_are_answered_some_at_a_time(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, sizes = tiny_trainer(tmp_path).scorer, list[int]()
    prompts = [[1, 5 + i, 9] for i in range(40)]
    answer_some = scorer_module.answer_greedily

    def answer_greedily(model: Any, some: Sequence[Sequence[int]], *rest: Any) -> list[GreedyAnswer]:
        sizes.append(len(some))
        return answer_some(model, some, *rest)

    monkeypatch.setattr(scorer_module, "answer_greedily", answer_greedily)
    answers = scorer.answer(prompts, {2}, 3)
    assert sizes == [32, 8]
    assert answers[35:37] == scorer.answer(prompts[35:37], {2}, 3)


def test_log_probs_of_pairs_are_those_of_their_sequences_alone(
    tiny_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = tiny_trainer(tmp_path, objective="dpo", pack_length=200)
    scorer: Scorer = trainer.scorer
    with scorer.evaluating():
        scored = [each for some, own in scorer.passes(trainer.examples[:6], ALL) for each in some if own]
        assert len(scored) == 6
        for each in scored:
            for sequence, logprobs in zip(each.example.sequences, each.policy, strict=True):
                (alone,) = target_logprobs(trainer.model, [sequence.ids], [trained_positions(sequence)])
                torch.testing.assert_close(logprobs, alone, rtol=0, atol=2e-5)
