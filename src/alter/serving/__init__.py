"""The model in use: an OpenAI-compatible server, a chat, the inspector."""
