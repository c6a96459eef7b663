"""The recipe: one frozen, validated TOML file with every setting of a run.

Each setting is declared and documented once, in one of these modules; `reference` turns them into `docs/recipe.md`.
Settings that exclude each other are refused by name. A recipe is checked by itself: whether its files exist is not.
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
