"""Conversation ↔ token ids and trained mask: the only place where text meets special tokens.

`rendering` turns messages into text, `tokenization` turns text into ids, and `template` combines the two and checks them.
"""

from corral.template.template import Template
from corral.template.tokenization import Encoded

__all__ = ["Encoded", "Template"]
