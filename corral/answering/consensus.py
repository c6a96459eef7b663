"""Votes among several answers to one question: which one agrees best with the others (self-consistency).

Texts in, a choice out, without a model: sentence embeddings are passed in. A `Ballot` takes the answers as they end, and knows
when those still to come cannot change the choice.

`rouge-l` takes the answer with the highest mean ROUGE-L F against the others: minimum Bayes risk with that as utility (Kumar &
Byrne 2004; Bertsch et al. 2023, arXiv 2310.01387). `majority` is self-consistency proper (Wang et al. 2022, arXiv 2203.11171).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from corral.metrics import answer_extraction
from corral.metrics.rouge import Rouge, unicode_words

Method: TypeAlias = Literal["rouge-l", "cosine", "majority", "rouge-l+math"]
StopRule: TypeAlias = Literal["never", "lossless", "adaptive"]
Floats: TypeAlias = NDArray[np.float64]
Embed: TypeAlias = Callable[[Sequence[str]], Floats]
"""n texts → [n, d] vectors of length 1."""

LEAD_CERTAINTY = 0.95
"""An adaptive vote ends when the first result leads the second with this probability."""


COMPARED_WORDS = 8192
"""Of each answer, by ROUGE-L: 64 answers of this length take a minute."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer that takes part in a vote."""

    text: str
    logprob: float | None = None
    """Mean natural log-probability of its tokens, which breaks ties. A candidate without one loses them."""


@dataclass(frozen=True, slots=True)
class Vote:
    """The outcome of a vote. Its tuples have an entry for each requested answer: None for one that was cancelled."""

    method: Method
    winner: int
    scores: tuple[float | None, ...]
    """`rouge-l` and `cosine`: mean agreement with the others. `majority`: the share of the answers with a result that have
    this one's; 0 for an answer without a result."""
    results: tuple[str | None, ...]
    """The results that a majority counted; None where texts were compared."""
    cancelled: int
    """How many answers were not needed."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """How answers are sampled and voted on.

    Args:
        n: answers sampled.
        temperature, top_p: as in Sampling.
        stop: when the remaining answers are cancelled; see `Ballot.is_decided`.
        embed: needed by `cosine`.
        rouge: splits texts into words; by default words of any script.
    """

    method: Method
    n: int = 5
    temperature: float = 0.7
    top_p: float = 0.9
    stop: StopRule = "lossless"
    embed: Embed | None = None
    rouge: Rouge = field(default_factory=lambda: Rouge(unicode=True))

    def __post_init__(self) -> None:
        if self.method == "cosine" and self.embed is None:
            raise ValueError("a vote by cosine needs `embed`")

    def new_ballot(self, n: int | None = None) -> Ballot:
        """A new vote among `n` answers; by default `Consensus.n`."""
        return Ballot(self, n or self.n)

    def vote(self, candidates: Sequence[Candidate]) -> Vote:
        """The vote among answers that have all ended; at least one."""
        ballot = self.new_ballot(len(candidates))
        for i, candidate in enumerate(candidates):
            ballot.add(i, candidate)
        return ballot.vote()


class Ballot:
    """One vote that takes its answers one by one, in any order."""

    def __init__(self, consensus: Consensus, n: int) -> None:
        self._consensus = consensus
        self._n = n
        self._candidates: dict[int, Candidate] = {}
        self._results: dict[int, str | None] = {}
        self._words: dict[int, str] = {}
        """What an answer says: answers that say the same have the same words."""

    def add(self, index: int, candidate: Candidate) -> bool:
        """Add an answer that has ended. Returns: `is_decided`."""
        self._candidates[index] = candidate
        self._results[index] = self._result(candidate.text)
        if self._consensus.method != "majority":
            is_exact = self._consensus.method == "cosine"
            self._words[index] = candidate.text.strip() and (
                candidate.text if is_exact else " ".join(unicode_words(candidate.text))
            )
        return self.is_decided

    @property
    def is_decided(self) -> bool:
        """True if the remaining answers are not needed.

        `lossless`: whatever they say, the winner says the same (the same result in a majority, else the same words).
        A majority is decided when its lead is greater than the number of remaining answers. Agreement is decided when k
        answers of n have the same words and k − 1 ≥ 4·(n − k − 1): with d = 1 − F, 2d/(1 + d) is a metric (Steinhaus'
        transform of the edit distance without substitution), so an answer at distance d from the k agrees with each of the
        others by at most 4d/(1 + 3d) more than they do, and with each of the k by d less. For cosine, all but one must be
        the same text.
        `adaptive`: also when the first result leads the second with a probability of 95 % (a Beta posterior over the two:
        Aggarwal et al. 2023, arXiv 2305.11860).
        """
        done, n = len(self._candidates), self._n
        if self._consensus.stop == "never" or done >= n:
            return done >= n
        match self._consensus.method:
            case "majority":
                return self._majority_decided()
            case "rouge-l+math":
                with_number = sum(result is not None for result in self._results.values())
                if 2 * with_number > n:
                    return self._majority_decided()
                return 2 * (with_number + n - done) <= n and self._agreement_decided(4)
            case "rouge-l":
                return self._agreement_decided(4)
            case "cosine":
                return self._agreement_decided(math.inf)

    def vote(self) -> Vote:
        """The choice among the answers that have ended; at least one has. Ties: by log-probability, then by index."""
        indexes = sorted(self._candidates)
        if not indexes:
            raise ValueError("no answer has ended")
        method = self._consensus.method
        counted = method == "majority" or (
            method == "rouge-l+math" and 2 * sum(r is not None for r in self._results.values()) > len(indexes)
        )
        scores = self._vote_shares(indexes) if counted else self._mean_agreements(indexes)
        second = [0.0] * len(indexes)
        if method == "rouge-l+math" and counted:
            # Among the answers with the winning result, prefer the one that agrees best with the rest of them.
            best = {self._results[i] for i, s in zip(indexes, scores, strict=True) if s == max(scores)}
            group = [i for i in indexes if self._results[i] in best]
            agreements = dict(zip(group, self._mean_agreements(group), strict=True))
            second = [agreements.get(i, 0.0) for i in indexes]
        logprobs = [self._candidates[i].logprob for i in indexes]
        third = [-math.inf if value is None else value for value in logprobs]
        ranked = [
            # Rounded, because the last bits of a mean depend on the order of its terms.
            (round(s, 12), round(t, 12), u, -i)
            for s, t, u, i in zip(scores, second, third, indexes, strict=True)
        ]
        score_of = dict(zip(indexes, scores, strict=True))
        return Vote(
            method,
            -max(ranked)[-1],
            tuple(score_of.get(i) for i in range(self._n)),
            tuple(self._results.get(i) if counted else None for i in range(self._n)),
            self._n - len(indexes),
        )

    def _result(self, text: str) -> str | None:
        match self._consensus.method:
            case "majority":
                return answer_extraction.extract_result(text)
            case "rouge-l+math":
                return answer_extraction.extract_number(text)
            case _:
                return None

    def _majority_decided(self) -> bool:
        counts = Counter(result for result in self._results.values() if result is not None)
        (_, first), (_, second) = (*counts.most_common(2), (None, 0), (None, 0))[:2]
        if first - second > self._n - len(self._candidates):
            return True
        return self._consensus.stop == "adaptive" and lead_probability(first, second) >= LEAD_CERTAINTY

    def _agreement_decided(self, against: float) -> bool:
        """True if the answers that say the same outweigh `against` times all others."""
        same = max(Counter(filter(None, self._words.values())).values(), default=0)
        others = self._n - same - 1
        return same >= 2 and (others <= 0 or same - 1 >= against * others)

    def _mean_agreements(self, indexes: Sequence[int]) -> list[float]:
        """Mean agreement of each answer with the others; 1 if there is only one."""
        if len(indexes) == 1:
            return [1.0]
        texts = [self._candidates[i].text for i in indexes]
        if self._consensus.method == "cosine":
            assert self._consensus.embed is not None
            vectors = self._consensus.embed(texts)
            not_empty = np.array([bool(text.strip()) for text in texts])
            matrix = vectors @ vectors.T * np.outer(not_empty, not_empty)
        else:
            matrix = self._consensus.rouge.pairwise_rouge_l(texts, COMPARED_WORDS)
        np.fill_diagonal(matrix, 0.0)
        return (matrix.sum(axis=1) / (len(indexes) - 1)).tolist()

    def _vote_shares(self, indexes: Sequence[int]) -> list[float]:
        counts = Counter(result for result in self._results.values() if result is not None)
        total = max(1, counts.total())
        return [counts[result] / total if (result := self._results[i]) is not None else 0.0 for i in indexes]


def lead_probability(first: int, second: int) -> float:
    """The probability that the result with `first` votes is really more likely than the one with `second` votes.

    With a uniform prior it is P(p > ½) for p ~ Beta(first + 1, second + 1), a sum of binomial terms.
    """
    draws = first + second + 1
    return sum(math.comb(draws, k) for k in range(first + 1)) / 2**draws
