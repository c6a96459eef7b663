"""Text → number, without a model: ROUGE, BLEU, and the answer extracted from a text."""
