"""The engine behind a URL: any OpenAI-compatible server that takes token ids."""
