"""From rows in files to token ids on disk: read, understand, choose, split, encode, account for.

`prepared.prepare` does the whole of it; the other modules are its steps. None of them knows about models or training.
"""
