"""Votes among answers: how long they take, and whether they choose as rouge-score would.

27,500 sets of 5 answers of 200 words, as in a large batch with self-consistency, are voted on one after the other on
one core: `Consensus("rouge-l").vote`, from raw texts to the choice. The texts are excerpts of the prose that ships with
Python (`pydoc_data`); the answers of a set begin alike and then differ, with some words replaced. Word stems are cached
from one set to the next, as in a batch.

`vote_agrees_with_rouge_score`: the percentage of 2,000 other sets of 2 to 7 answers (unusual words, empty texts, repeats) in
which the choice has the highest mean ROUGE-L F by rouge-score, ties to the first; with the Latin words that rouge-score
recognises.

    python benchmarks/vote.py [--json FILE]
"""

from __future__ import annotations

import os
import random
import sys
import time
from pydoc_data.topics import topics
from typing import Any

from claims import Claim, parser, report
from rouge_score.rouge_scorer import RougeScorer

from corral.answering.consensus import Candidate, Consensus
from corral.metrics.rouge import Rouge

SETS = 27_500
ANSWERS = 5
WORDS = 200
AGREEING_SETS = 2_000
SEED = 7
ODD = ["naïve", "don't", "1,000", "C++", "running", "ran", "x²", "東京", "$5", "re-use", "", "\n", "A", "a"]


def main() -> int:
    options = parser(__doc__).parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    words = " ".join(topics.values()).split()
    seconds = measure_speed(words)
    agreeing = count_agreeing(words)
    claims = [
        Claim("vote_seconds_27500x5", round(seconds, 1), "s on one core", 60, "<="),
        Claim("vote_agrees_with_rouge_score", 100 * agreeing / AGREEING_SETS, f"% of {AGREEING_SETS:,} sets", 100),
    ]
    raw = {"sets": SETS, "answers": ANSWERS, "words": WORDS, "seconds": seconds, "agreeing": agreeing}
    return report(claims, raw, ["rouge-score", "rapidfuzz", "nltk", "numpy"], options.json)


def measure_speed(words: list[str]) -> float:
    """Seconds for all sets, without generating them."""
    rng = random.Random(SEED)
    consensus = Consensus("rouge-l", ANSWERS)
    seconds, winners = 0.0, [0] * ANSWERS
    for _ in range(SETS):
        candidates = [Candidate(text) for text in answers(words, rng, ANSWERS, WORDS)]
        began = time.perf_counter()
        winner = consensus.vote(candidates).winner
        seconds += time.perf_counter() - began
        winners[winner] += 1
    print(f"{SETS:,} votes: {seconds:.1f} s; chosen by position: {winners}")
    return seconds


def answers(words: list[str], rng: random.Random, n: int, length: int) -> list[str]:
    """Texts with a common beginning."""
    start, shared = rng.randrange(len(words) - length), rng.randrange(length // 4, length)
    texts: list[str] = []
    for _ in range(n):
        other = rng.randrange(len(words) - length)
        text = words[start : start + shared] + words[other : other + length - shared]
        for position in rng.sample(range(length), length // 10):
            text[position] = rng.choice(words)
        texts.append(" ".join(text))
    return texts


def count_agreeing(words: list[str]) -> int:
    """In how many sets both make the same choice."""
    rng = random.Random(SEED + 1)
    theirs: Any = RougeScorer(["rougeL"], use_stemmer=True)
    agreeing = 0
    for _ in range(AGREEING_SETS):
        texts = answers([*words[:400], *ODD * 20], rng, rng.randint(2, 7), rng.choice((4, 10, 30)))
        texts = ["" if rng.random() < 0.05 else text for text in texts]
        consensus = Consensus("rouge-l", len(texts), rouge=Rouge())
        ours = consensus.vote([Candidate(text) for text in texts]).winner
        means = [
            sum(theirs.score(other, text)["rougeL"].fmeasure for j, other in enumerate(texts) if j != i)
            / (len(texts) - 1)
            for i, text in enumerate(texts)
        ]
        # The last bits of a mean depend on the order of its terms.
        rounded = [round(mean, 12) for mean in means]
        agreeing += ours == rounded.index(max(rounded))
    print(f"{agreeing:,} of {AGREEING_SETS:,} choices are rouge-score's")
    return agreeing


if __name__ == "__main__":
    sys.exit(main())
