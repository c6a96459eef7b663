"""Conversation → the conversation that the model is asked: few-shot examples and chain-of-thought instructions."""
