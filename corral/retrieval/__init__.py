"""Documents → passages → an index → the passages that answer a question. It knows no model of language and no prompt."""
