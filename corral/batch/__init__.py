"""Answers a file of prompts at the engine's full speed; an interrupted batch resumes: `corral batch`."""

from corral.batch.answer_file import BatchResult, answer_file

__all__ = ["BatchResult", "answer_file"]
