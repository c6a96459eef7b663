"""The HTTP server: protocols as types, handlers that answer them, admission, keys, stored conversations, and the process."""
