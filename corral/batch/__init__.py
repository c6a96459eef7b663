"""Answers to a file of prompts, at the engine's full speed, through kills and stops: `corral batch`.

`prompts` reads rows, `journal` keeps what is finished, `answering` (one machine) and `cluster` (Ray) compute, `settings` says
with what, `running` puts them together. This package does not know how an answer comes about: that is the Answerer.
"""

from corral.batch.answer_file import Outcome, answer_file

__all__ = ["Outcome", "answer_file"]
