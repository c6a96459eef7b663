"""The server: what goes over the wire (`protocol`), what becomes of it (`completions`), routes (`app`), the process
(`server`). Knows nothing about how a model was made."""
