"""Turns rows in files into token ids on disk: read, parse, sample, split, encode, account for.

`prepare.prepare` runs all steps; the other modules are the steps.
"""
