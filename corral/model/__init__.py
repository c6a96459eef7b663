"""Loading, adapting, computing and merging models."""
