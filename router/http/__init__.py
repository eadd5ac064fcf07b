"""The OpenAI-compatible door: HTTP in, JSON or server-sent events out; generations are those of every other door."""
