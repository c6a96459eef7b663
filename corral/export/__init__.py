"""Exported forms of a merged model (GGUF, OpenVINO), and the contract that proves each equal to its source."""
