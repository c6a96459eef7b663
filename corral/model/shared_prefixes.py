"""Which tokens of a pack are computed where sequences begin alike: what they begin with is computed once.

In a causal model the states of a token depend on the tokens up to it alone. So the two answers of a pair have the keys, values
and hidden states of their prompt in common, and gradients of both flow into them: log-probabilities and gradients are those of
whole sequences, to rounding. Sequences of different pairs share what a template begins all of them with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """The tokens that a pack computes.

    Args:
        ids: token ids, sequence by sequence, without what a sequence shares with an earlier one.
        positions: of each in its sequence.
        lengths: how many of them each sequence has of its own; none is 0, so there may be fewer than sequences.
        prefixes: for each of `lengths`, which tokens of the pack come before them in their sequence; empty for a whole one.
        rows: for each sequence and each of its tokens, which token of the pack it is.
    """

    ids: list[int]
    positions: list[int]
    lengths: list[int]
    prefixes: list[list[int]]
    rows: list[Sequence[int]]


def pack_tokens(sequences: Sequence[Sequence[int]], *, share: bool) -> PackedTokens:
    """Lay sequences out end to end, with what they begin with once if `share`."""
    pack = PackedTokens([], [], [], [], [])
    for sequence in sequences:
        prefix: Sequence[int] = ()
        if share and pack.rows:
            common = [_common_length(sequence, earlier) for earlier in sequences[: len(pack.rows)]]
            longest = max(common)
            prefix = pack.rows[common.index(longest)][:longest]
        first, start = len(pack.ids), len(prefix)
        if start < len(sequence):
            pack.ids.extend(sequence[start:])
            pack.positions.extend(range(start, len(sequence)))
            pack.lengths.append(len(sequence) - start)
            pack.prefixes.append([*prefix])
        pack.rows.append([*prefix, *range(first, len(pack.ids))])
    return pack


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    shorter = min(len(first), len(second))
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), shorter)
