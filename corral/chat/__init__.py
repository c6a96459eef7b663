"""A conversation in the terminal, with a local model or any OpenAI-compatible server."""
