"""The model in use: an OpenAI-compatible server, a chat, the inspector.

One thread owns the model (`engine`) and answers `jobs`; `openai` with `protocol` and `replies` is the server,
`upstream` routes for another one, `web` is what servers need. `chat` is the terminal; `inspector`, `analysis` and
`markup` are the page that shows each token's expert. No other package imports from here.
"""
