"""The stages of a recipe, run in order over one run directory."""
