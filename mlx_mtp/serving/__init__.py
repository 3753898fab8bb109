"""The server: app.py and its parts: requests in OpenAI's form, the engine's thread, kept sessions, guards, metrics."""
