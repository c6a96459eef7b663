"""Scoring answers and comparing variants."""
