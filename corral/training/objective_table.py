"""The objectives by their recipe names: what rows they take, and how they are built. Nothing here needs torch until then."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corral.messages import Conversation, Feedback, Preference, Record, Text

if TYPE_CHECKING:
    from corral.recipe import Train
    from corral.training.objectives import Objective

TAKES: Mapping[str, tuple[type[Record], ...]] = {
    "sft": (Conversation, Text),
    "dpo": (Preference,),
    "ipo": (Preference,),
    "orpo": (Preference,),
    "simpo": (Preference,),
    "kto": (Feedback, Preference),
    "ulma": (Feedback, Preference),
}
"""Types of the records that each objective trains. One of single answers takes both answers of a pair."""


def build_objective(config: Train) -> Objective:
    """The objective of a training stage, with its settings."""
    from corral.training.objectives import Sft

    if config.objective == "sft":
        return Sft()
    from corral.training import alignment_losses

    kinds: Mapping[str, type[Any]] = {
        "dpo": alignment_losses.Dpo,
        "ipo": alignment_losses.Ipo,
        "kto": alignment_losses.Kto,
        "orpo": alignment_losses.Orpo,
        "simpo": alignment_losses.Simpo,
        "ulma": alignment_losses.Ulma,
    }
    return kinds[config.objective](getattr(config, config.objective))
