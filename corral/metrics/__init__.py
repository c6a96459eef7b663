"""Text → number, without a model: ROUGE, BLEU, chrF, exact match, token F1; and the answer extracted from a text."""
