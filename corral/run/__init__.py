"""The run directory: paths, fingerprints, lineage and lock."""
