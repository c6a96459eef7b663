"""ROUGE against rouge-score: speed, and whether every score is equal.

Speed is end to end, from raw texts of 300 words to the F of ROUGE-1, -2 and -L with stemming; the same pairs, one after the
other in one process on one thread. Each repeat has its own pairs, so that only the stems of words seen before can be reused;
`cold_ratio` in the raw figures is that of the first repeat, when no stems were cached.

The texts are excerpts of the prose that ships with Python (`pydoc_data`); a candidate is the first half of its reference
followed by another excerpt, with a tenth of the words replaced. Equality is counted on other pairs: unusual words, random
characters of any script, repeats and empty texts, scored with and without stemming.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

from claims import Claim, parser, report
from rouge_score.rouge_scorer import RougeScorer

from corral.metrics.rouge import Rouge

WORDS = 300
PAIRS = 1000
REPEATS = 5
EXACT_PAIRS = 10_000
SEED = 20_000
ODD_TEXT = """
naïve café Straße İstanbul ΣΊΣΥΦΟΣ \u212a ﬁne ① ２０２４ x² 東京 タワー นกแก้ว नमस्ते Привет مرحبا 안녕 😀 e\u0301 ß ſ
don't re-use a_b 3.14 1,000 1234567890 0 00 12ab ab12 C++ $5 50% (x) "y" -- ... ! ? # @a http://a.b/c?d=e \ud800
running runs ran relational flies dying news skies yyyy alli fully agreed feed at a I abc abcd abcde ABC
"""
ODD_TOKENS = [*ODD_TEXT.split(), "\n", "\t", "\r\n", "\u00a0", "\u2003", "\x00", "\x7f"]


def main() -> int:
    options = parser(__doc__).parse_args()
    speed = measure_speed()
    different = count_different()
    claims = [
        Claim("rouge_speed_vs_rouge_score", round(speed["median_ratio"], 1), "times faster, median", 100),
        Claim("rouge_exact", 100 * (1 - different / EXACT_PAIRS), f"% of {EXACT_PAIRS:,} pairs bit-equal", 100),
    ]
    raw = {"speed": speed, "exact": {"pairs": EXACT_PAIRS, "stemming": [True, False], "different": different}}
    return report(claims, raw, ["rouge-score", "rapidfuzz", "nltk", "numpy"], options.json)


def measure_speed() -> dict[str, Any]:
    """Seconds of both for PAIRS pairs, REPEATS times; corral's `Rouge` is created once, as in an evaluation."""
    rng = random.Random(SEED)
    words = " ".join(topics.values()).split()
    ours = Rouge(stemmer=True)
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    ours.score("warm-up imports", "the stemmer"), theirs.score("warm-up imports", "the stemmer")
    runs: list[dict[str, float]] = []
    print(f"{PAIRS} pairs of {WORDS} words; seconds of rouge-score and corral")
    for _ in range(REPEATS):
        pairs = [prose_pair(words, rng) for _ in range(PAIRS)]
        theirs_seconds, expected = timed(lambda: [theirs_f(theirs, *pair) for pair in pairs])  # noqa: B023
        ours_seconds, got = timed(lambda: [tuple(ours.score(*pair)) for pair in pairs])  # noqa: B023
        assert got == expected, "the two disagree on the pairs they were timed on"
        runs.append({"rouge_score_s": theirs_seconds, "corral_s": ours_seconds, "ratio": theirs_seconds / ours_seconds})
        print(f"  {theirs_seconds:8.2f} {ours_seconds:8.4f}   {runs[-1]['ratio']:.0f}×")
    ratios = [run["ratio"] for run in runs]
    return {
        "pairs": PAIRS,
        "words_per_text": WORDS,
        "median_ratio": statistics.median(ratios),
        "cold_ratio": ratios[0],
        "runs": runs,
        "vote_27500x5": measure_vote(words, rng),
    }


def measure_vote(words: list[str], rng: random.Random, prompts: int = 2_750) -> dict[str, float]:
    """Time of the agreement of five answers of 200 words, for a tenth of 27,500 prompts, and extrapolated to all."""
    rouge = Rouge(stemmer=True, unicode=True)
    answers = [[" ".join(window(words, 200, rng)) for _ in range(5)] for _ in range(prompts)]
    seconds, _ = timed(lambda: [rouge.pairwise_rouge_l(five) for five in answers])
    print(f"agreement of 5 answers of 200 words: {seconds / prompts * 27_500:.1f} s for 27,500 prompts")
    return {"prompts_measured": prompts, "seconds": seconds, "seconds_for_27500": seconds / prompts * 27_500}


def count_different() -> int:
    """Number of the EXACT_PAIRS unusual pairs with any score that is not bit-equal, with or without stemming."""
    rng = random.Random(SEED + 1)
    vocabulary = sorted(set(" ".join(topics.values()).split()))
    both = {
        stem: (Rouge(stemmer=stem), RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stem)) for stem in (0, 1)
    }
    different = 0
    for _ in range(EXACT_PAIRS):
        reference, candidate = odd_pair(vocabulary, rng)
        different += any(
            tuple(ours.score(reference, candidate)) != theirs_f(theirs, reference, candidate)
            for ours, theirs in both.values()
        )
    return different


def theirs_f(scorer: RougeScorer, reference: str, candidate: str) -> tuple[float, ...]:
    return tuple(score.fmeasure for score in scorer.score(reference, candidate).values())


def timed(work: Callable[[], list[Any]]) -> tuple[float, list[Any]]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def window(words: list[str], size: int, rng: random.Random) -> list[str]:
    start = rng.randrange(len(words) - size)
    return words[start : start + size]


def prose_pair(words: list[str], rng: random.Random) -> tuple[str, str]:
    reference = window(words, WORDS, rng)
    candidate = reference[: WORDS // 2] + window(words, WORDS // 2, rng)
    for _ in range(WORDS // 10):
        candidate[rng.randrange(WORDS)] = rng.choice(words)
    return " ".join(reference), " ".join(candidate)


def odd_pair(vocabulary: list[str], rng: random.Random) -> tuple[str, str]:
    """Two texts of up to 60 words from a small vocabulary, with unusual tokens, random characters and empty texts."""
    few = rng.sample(vocabulary, 12) + rng.sample(ODD_TOKENS, 6) + ["".join(random_characters(rng)) for _ in range(2)]
    reference, candidate = (rng.choices(few, k=rng.choice((0, 1, 2, 5, 20, 60))) for _ in range(2))
    if rng.random() < 0.3:
        candidate = reference[: len(reference) // 2] + candidate[len(candidate) // 2 :]
    separator = rng.choice((" ", " ", "\n", ", ", "-", ""))
    return separator.join(reference), separator.join(candidate)


def random_characters(rng: random.Random) -> list[str]:
    return [chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)))) for _ in range(8)]


if __name__ == "__main__":
    sys.exit(main())
