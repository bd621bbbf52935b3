"""The model in use: an OpenAI-compatible server, a chat, the inspector.

One thread owns the model (`engine`) and answers `jobs`; `openai` with `protocol` and `replies` is the server,
`upstream` routes for another one, `web` is what servers need. `chat` is the terminal; `inspector`, `analysis` and
`markup` are the page that shows each token's expert. `alter.serve` is its public face.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.serving.engine import Engine as Engine
    from alter.serving.jobs import Job as Job
    from alter.serving.openai import application as application
    from alter.serving.protocol import ChatAsked as ChatAsked
    from alter.serving.protocol import TextAsked as TextAsked
    from alter.serving.settings import Serve as Serve

lazy(globals())
