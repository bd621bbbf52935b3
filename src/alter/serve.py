"""Public: answer requests with a model in your own process, as `alter serve` does.

An `Engine` owns a loaded model in a thread of its own and answers each `Job` put into it, many at once, so that no answer hangs on
who else asks; `application` is the OpenAI-compatible web application around it, with the limits of `Serve`. `ChatAsked` and
`TextAsked` are the bodies that its two endpoints take, with the prompts in tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.serving import ChatAsked as ChatAsked
    from alter.serving import Engine as Engine
    from alter.serving import Job as Job
    from alter.serving import Serve as Serve
    from alter.serving import TextAsked as TextAsked
    from alter.serving import application as application

lazy(globals())
