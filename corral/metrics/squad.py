"""SQuAD's scores of short answers: exact match and token F1 (Rajpurkar et al. 2016, arXiv 1606.05250).

Both compare normalised texts: lower case, without punctuation of ASCII, without the English articles, split at spaces. A text
in a script without spaces between words is therefore one token.
"""

from __future__ import annotations

import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized_tokens(text: str) -> list[str]:
    """The words that are compared."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def exact_match(reference: str, candidate: str) -> bool:
    """Whether the normalised texts are equal."""
    return normalized_tokens(reference) == normalized_tokens(candidate)


def token_f1(reference: str, candidate: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, each counted as often as both texts have it.

    As in SQuAD 2.0 (arXiv 1806.03822), where one text has no words the score is 1 if neither has any, else 0.
    """
    expected, given = normalized_tokens(reference), normalized_tokens(candidate)
    if not expected or not given:
        return float(expected == given)
    common = sum((Counter(expected) & Counter(given)).values())
    return 2 * common / (len(expected) + len(given))
