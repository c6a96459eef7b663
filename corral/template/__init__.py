"""Conversation ↔ token ids and trained mask: the only place where text meets special tokens.

`rendering` turns messages into text, `tokenization` turns text into ids, and `template` combines the two and checks them.
"""

from corral.template.rendering import Variables
from corral.template.template import Template, own_templates
from corral.template.tokenization import Encoded

__all__ = ["Encoded", "Template", "Variables", "own_templates"]
