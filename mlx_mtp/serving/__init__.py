"""The HTTP server: app.py and its parts; cli/serve.py starts it."""
