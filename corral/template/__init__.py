"""Conversation ↔ token ids and trained mask: the only place where text meets special tokens.

`rendering` makes text of messages, `tokenising` makes ids of text, and `template` holds the two together and to their
promises. Nothing here knows where conversations come from, how long they may be, or what is done with the ids.
"""

from corral.template.template import Encoded, Template

__all__ = ["Encoded", "Template"]
