"""The recipe: one frozen, validated TOML file that says everything a run needs.

Every setting is declared once, in one of these modules, and documented where it stands; `reference` makes `docs/recipe.md`
of it. What cannot be combined cannot be written, or is refused with both keys named. This package does not know how
anything is done: it checks that a recipe makes sense by itself, never that its files exist.
"""

from corral.recipe.answer import Answer, Consensus, Shots
from corral.recipe.data import Data, Mapping, Model, Source, Split
from corral.recipe.evaluate import Evaluate, Task, Variant
from corral.recipe.parse import load, parse
from corral.recipe.recipe import Export, Recipe
from corral.recipe.section import section_type
from corral.recipe.train import Lora, Optimizer, Train

__all__ = [
    "Answer",
    "Consensus",
    "Data",
    "Evaluate",
    "Export",
    "Lora",
    "Mapping",
    "Model",
    "Optimizer",
    "Recipe",
    "Shots",
    "Source",
    "Split",
    "Task",
    "Train",
    "Variant",
    "load",
    "parse",
    "section_type",
]
