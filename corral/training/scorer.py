"""Log-probabilities of examples by the model in training, in packed forward passes over the processes of a run.

Where examples have several sequences, such as the two answers of a pair, a pass computes their common prompt once.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from corral.data.packing import pack_sequences
from corral.model.greedy import GreedyAnswer, answer_greedily
from corral.model.packed_forward import can_share_prefixes, target_logprobs
from corral.training import sharding
from corral.training.distributed import World
from corral.training.objectives import Scored, trained_positions
from corral.training.reference_logprobs import Logprobs, ReferencedExample

if TYPE_CHECKING:
    from torch import Tensor

    from corral.data.example_store import Example

_ANSWERED_TOGETHER = 32
ALL = slice(None)
"""All sequences of an example."""


class Scorer:
    """Scores examples with a model's current weights.

    Args:
        model: a causal language model, or a PEFT model around one.
        sharded: the same model in shards, if it is; then all processes must make the same calls.
        pack_length: maximum tokens of one forward pass.
    """

    def __init__(
        self, model: torch.nn.Module, sharded: sharding.ShardedModel | None, pack_length: int, world: World
    ) -> None:
        self.model, self.pack_length, self._sharded, self._world = model, pack_length, sharded, world

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Without gradients and dropout."""
        self.model.eval()
        with torch.no_grad():
            yield
        if self._sharded is not None:
            self._sharded.free_whole_weights()

    def passes(self, batch: Sequence[Example], part: slice) -> Iterator[tuple[list[Scored], bool]]:
        """Each forward pass of this process's share of the batch: its examples, scored, and whether they are its own.

        Args:
            part: the sequences of each example to compute.
        """
        lengths = [token_count(e, part) for e in batch]
        passes = [
            [[batch[share[i]] for i in pack] for pack in pack_sequences([lengths[i] for i in share], self.pack_length)]
            for share in sharding.balance_by_tokens(lengths, self._world.size)
        ]
        own = passes[self._world.rank]
        for examples in own:
            yield self.score(examples, part), True
        if self._sharded is not None:  # all processes must make equally many passes
            for _ in range(max(map(len, passes)) - len(own)):
                yield self.score([min(batch, key=token_count)], part), False

    def score(self, examples: Sequence[Example], part: slice = ALL) -> list[Scored]:
        """The examples' sequences of a part, in one forward pass."""
        sequences = [s for e in examples for s in e.sequences[part]]
        positions = [trained_positions(s) for s in sequences]
        share = len(sequences) > len(examples) and can_share_prefixes(self.model)
        logprobs = iter(self.logprobs([s.ids for s in sequences], positions, share))
        return [
            Scored(
                example,
                tuple(next(logprobs) for _ in example.sequences[part]),
                example.reference[part] if isinstance(example, ReferencedExample) else (),
            )
            for example in examples
        ]

    def sums(self, batch: Sequence[Example]) -> list[Logprobs]:
        """For each sequence of each example the sum over its trained tokens, on every process."""
        sums: dict[int, list[float]] = {}
        with self.evaluating():
            for scored, own in self.passes(batch, ALL):
                if own:
                    values = iter(torch.stack([t.sum() for each in scored for t in each.policy]).tolist())
                    sums |= {id(each.example): [next(values) for _ in each.policy] for each in scored}
        of_others = [0.0]
        flat = [value for e in batch for value in sums.get(id(e), of_others * len(e.sequences))]
        total = iter(self._world.all_reduce_sums(flat))
        return [tuple(next(total) for _ in e.sequences) for e in batch]

    def answer(
        self, prompts: Sequence[Sequence[int]], stop_ids: Collection[int], max_tokens: int
    ) -> list[GreedyAnswer]:
        """Greedy answers to the prompts, some at a time, on every process: computed by rank 0 alone, or by all with a sharded
        model."""
        answers: list[GreedyAnswer] = []
        some = [prompts[i : i + _ANSWERED_TOGETHER] for i in range(0, len(prompts), _ANSWERED_TOGETHER)]
        with self.evaluating():
            if self._sharded is not None:
                how: dict[str, Any] = {"compute": self._sharded, "agree": self._world.broadcast}
                for each in some:
                    answers += answer_greedily(self.model, each, stop_ids, max_tokens, **how)
                return answers
            for each in some if self._world.is_main else ():
                answers += answer_greedily(self.model, each, stop_ids, max_tokens)
        return self._world.broadcast(answers)

    def logprobs(
        self, sequences: Sequence[Sequence[int]], positions: Sequence[Sequence[int]], share_prefixes: bool = False
    ) -> Sequence[Tensor]:
        """As `target_logprobs`."""
        if self._sharded is None:
            return target_logprobs(self.model, sequences, positions, share_prefixes)
        flat: Tensor = self._sharded(
            lambda: torch.cat(target_logprobs(self.model, sequences, positions, share_prefixes))
        )
        return flat.split([len(p) for p in positions])


def token_count(example: Example, part: slice = ALL) -> int:
    """Tokens of an example's sequences."""
    return sum(len(sequence.ids) for sequence in example.sequences[part])
