"""The run directory: recipe, lineage and lock; and the record of each stage, which says whether it is done."""
