"""Conversation → answer: an engine, a template, prompting and consensus composed into an Answerer."""
