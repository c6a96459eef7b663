"""The run directory: recipe, lineage and lock; the record of each stage, which says whether it is done; the promoted model."""
