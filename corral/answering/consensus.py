"""Votes over several answers to one question: which one agrees best with the others (self-consistency).

Pure: texts in, a choice out. `Ballot` takes the answers as they end, and says when those to come cannot change the choice. It
does not know how the answers were drawn; sentence embeddings come from outside.

`rouge-l` takes the answer with the highest mean ROUGE-L F against the others: minimum Bayes risk with that as utility (Kumar &
Byrne 2004; Bertsch et al. 2023, arXiv 2310.01387). `majority` is self-consistency proper (Wang et al. 2022, arXiv 2203.11171).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from corral.metrics import answer_extraction
from corral.metrics.rouge import Rouge

Method: TypeAlias = Literal["rouge-l", "cosine", "majority", "rouge-l+math"]
METHODS: tuple[Method, ...] = get_args(Method)
Stop: TypeAlias = Literal["never", "lossless", "adaptive"]
Floats: TypeAlias = NDArray[np.float64]
Embed: TypeAlias = Callable[[Sequence[str]], Floats]
"""n texts → [n, d] vectors of length 1."""

CERTAIN = 0.95
"""At which probability of its lead an adaptive vote ends."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer."""

    text: str
    logprob: float | None = None
    """Mean natural log-probability of its tokens: breaks ties. One that has none comes last among its equals."""


@dataclass(frozen=True, slots=True)
class Vote:
    """What a vote came to. Its lists have a place for each answer asked for; None for one that was cancelled."""

    method: Method
    winner: int
    scores: tuple[float | None, ...]
    """Of `rouge-l` and `cosine`: mean agreement with the others. Of `majority`: the share of votes for its result among
    those that have one, 0 without a result."""
    results: tuple[str | None, ...]
    """What was counted, by a majority; else None."""
    cancelled: int
    """Answers that were not needed."""


@dataclass(frozen=True, slots=True)
class Consensus:
    """How answers are drawn and voted on.

    Args:
        n: answers drawn.
        temperature, top_p: as in Sampling.
        stop: when the rest is cancelled; see `Ballot.decided`.
        embed: needed by `cosine`.
        rouge: reads the words; by default those of any script.
    """

    method: Method
    n: int = 5
    temperature: float = 0.7
    top_p: float = 0.9
    stop: Stop = "lossless"
    embed: Embed | None = None
    rouge: Rouge = field(default_factory=lambda: Rouge(unicode=True))

    def __post_init__(self) -> None:
        if self.method == "cosine" and self.embed is None:
            raise ValueError("a vote by cosine needs `embed`")

    def ballot(self, n: int | None = None) -> Ballot:
        """A new vote among `n` answers; by default as many as are drawn."""
        return Ballot(self, n or self.n)

    def vote(self, candidates: Sequence[Candidate]) -> Vote:
        """The vote among answers that are all there (at least one)."""
        ballot = self.ballot(len(candidates))
        for i, candidate in enumerate(candidates):
            ballot.add(i, candidate)
        return ballot.vote()


class Ballot:
    """One vote, answer by answer. Answers have their place; they may end in any order."""

    def __init__(self, consensus: Consensus, n: int) -> None:
        self._consensus = consensus
        self._n = n
        self._candidates: dict[int, Candidate] = {}
        self._results: dict[int, str | None] = {}

    def add(self, place: int, candidate: Candidate) -> None:
        """An answer has ended."""
        self._candidates[place] = candidate
        self._results[place] = self._result(candidate.text)

    @property
    def decided(self) -> bool:
        """Whether those to come are not needed.

        `lossless`: whatever they say, the winner says the same (the same result in a majority, else the same words).
        For a majority that is a lead greater than their number. For agreement, k answers of n say the same words and
        k − 1 ≥ 4·(n − k − 1): with d = 1 − F, 2d/(1 + d) is a metric (Steinhaus' transform of the edit distance without
        substitution), so an answer at distance d from the k agrees with each of the others by at most 4d/(1 + 3d)
        more than they do, and less by d with each of the k. For cosine all but one must be the same text.
        `adaptive`: also where the first result leads the second with a probability of 95 % (a Beta posterior over the two:
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
        """The choice among the answers that have ended; at least one has. Ties: by log-probability, then by place."""
        places = sorted(self._candidates)
        if not places:
            raise ValueError("no answer has ended")
        method = self._consensus.method
        counted = method == "majority" or (
            method == "rouge-l+math" and 2 * sum(r is not None for r in self._results.values()) > len(places)
        )
        scores = self._shares(places) if counted else self._agreement(places)
        second = [0.0] * len(places)
        if method == "rouge-l+math" and counted:
            # Of those with the winning result, the one that tells it most like the others.
            best = {self._results[p] for p, s in zip(places, scores, strict=True) if s == max(scores)}
            group = [p for p in places if self._results[p] in best]
            told = dict(zip(group, self._agreement(group), strict=True))
            second = [told.get(p, 0.0) for p in places]
        logprobs = [self._candidates[p].logprob for p in places]
        third = [-math.inf if value is None else value for value in logprobs]
        ranked = [
            # The last bits of a mean depend on the order of its terms.
            (round(s, 12), round(t, 12), u, -p)
            for s, t, u, p in zip(scores, second, third, places, strict=True)
        ]
        score_of = dict(zip(places, scores, strict=True))
        return Vote(
            method,
            -max(ranked)[-1],
            tuple(score_of.get(i) for i in range(self._n)),
            tuple(self._results.get(i) if counted else None for i in range(self._n)),
            self._n - len(places),
        )

    def _result(self, text: str) -> str | None:
        match self._consensus.method:
            case "majority":
                return answer_extraction.result(text)
            case "rouge-l+math":
                return answer_extraction.number(text)
            case _:
                return None

    def _majority_decided(self) -> bool:
        counts = Counter(result for result in self._results.values() if result is not None)
        (_, first), (_, second) = (*counts.most_common(2), (None, 0), (None, 0))[:2]
        if first - second > self._n - len(self._candidates):
            return True
        return self._consensus.stop == "adaptive" and lead_probability(first, second) >= CERTAIN

    def _agreement_decided(self, against: float) -> bool:
        """Whether so many say the same that `against` times the others could not outweigh them."""
        texts = [c.text for c in self._candidates.values() if c.text.strip()]
        if self._consensus.method == "cosine":
            groups = Counter(text.encode() for text in texts)
        else:
            groups = Counter(words.tobytes() for words in self._consensus.rouge.encode(texts) if words)
        same = max(groups.values(), default=0)
        others = self._n - same - 1
        return same >= 2 and (others <= 0 or same - 1 >= against * others)

    def _agreement(self, places: Sequence[int]) -> list[float]:
        """Mean agreement of each with the others; of a single one, 1."""
        if len(places) == 1:
            return [1.0]
        texts = [self._candidates[p].text for p in places]
        if self._consensus.method == "cosine":
            assert self._consensus.embed is not None
            vectors = self._consensus.embed(texts)
            says = np.array([bool(text.strip()) for text in texts])
            matrix = vectors @ vectors.T * np.outer(says, says)
        else:
            matrix = self._consensus.rouge.agreement(texts)
        np.fill_diagonal(matrix, 0.0)
        return (matrix.sum(axis=1) / (len(places) - 1)).tolist()

    def _shares(self, places: Sequence[int]) -> list[float]:
        counts = Counter(result for result in self._results.values() if result is not None)
        every = max(1, counts.total())
        return [counts[result] / every if (result := self._results[p]) is not None else 0.0 for p in places]


def lead_probability(first: int, second: int) -> float:
    """That the result with `first` votes is really more likely than that with `second`, as far as these tell.

    With a uniform prior: P(p > ½) for p ~ Beta(first + 1, second + 1), which is a sum of binomial terms.
    """
    draws = first + second + 1
    return sum(math.comb(draws, k) for k in range(first + 1)) / 2**draws
