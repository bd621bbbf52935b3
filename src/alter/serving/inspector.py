"""`alter inspect`: the page where a person asks a model and sees before and after, entropies, and each token's expert.

`analysis` computes, `markup` writes HTML; here is what Gradio puts around them.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from alter.core import UserError
from alter.data import load_examples
from alter.inference import context_length
from alter.requests import Store
from alter.serving.analysis import Analysis, Stopped, analyse, check_adapted, expert_names
from alter.serving.markup import COLORS, STYLE, About, message, render, render_about, render_begun, render_request
from alter.serving.settings import MOST_NEW_TOKENS, Inspect
from alter.serving.web import HostGuard, address, listen
from alter.storage import read_object

OFFERED = 6
"""Questions that the page offers."""


def about(settings: Inspect, model: Any) -> About:
    """Collect what the page shows about itself, from the settings, the model, and the record of the adapter's run.

    Raises:
        UserError: `forget` names no rows.
    """
    path = Path(settings.adapter).expanduser().resolve()
    # a run keeps its record beside the adapter
    record = path.parent / "run.json"
    run = read_object(record, "the record of a run") if record.is_file() else {}
    made = run.get("settings", {})
    names = expert_names(model)
    source = settings.forget or made.get("forget")
    questions: tuple[str, ...] = ()
    if source is not None:
        try:
            prompts = [example.prompt for example in load_examples(source) if example.prompt]
            # spread over all rows, so that several sub-domains occur
            questions = tuple(dict.fromkeys(prompts[:: max(len(prompts) // OFFERED, 1)]))[:OFFERED]
        except UserError:
            # the rows of a run may be erased by now, as they should be
            if settings.forget is not None:
                raise
    kind = f"ALTER, {len(names) - 1} forget experts" if names else made.get("method") or "no experts"
    shown = "" if source is None else source if ":" in source else Path(source).name
    return About(
        model=_name(settings.model),
        adapter=path.parent.name if path.name == "adapter" else path.name,
        kind=kind,
        forgotten=shown,
        questions=questions,
    )


def _name(model: str) -> str:
    return Path(model).name if Path(model).expanduser().is_dir() else model


class Inspector:
    """A model that several people inspect: one analysis at a time, others wait.

    Attributes:
        model, tokenizer: see `analyse`.
        store: database of requests, or None.
        about: what the page says of itself, or None.
    """

    def __init__(self, model: Any, tokenizer: Any, store: Store | None = None, about: About | None = None) -> None:
        check_adapted(model)
        self.model, self.tokenizer, self.store, self.about = model, tokenizer, store, about
        self.lock = threading.Lock()

    def analyse(self, prompt: str, max_new_tokens: int = 100, off: Collection[int] = (), **options: Any) -> Analysis:
        """Run `analyse` once the model is free."""
        with self.lock:
            return analyse(self.model, self.tokenizer, prompt, max_new_tokens=max_new_tokens, off=off, **options)

    def answer(self, prompt: str, max_new_tokens: int, off: Collection[int]) -> Iterator[str]:
        """Yield HTML of both answers as they are generated, then of the whole analysis; or of what is wrong with the prompt.

        The model works in a thread of its own, which ends when nobody reads on.
        """
        told: queue.Queue[tuple[str, str]] = queue.Queue()
        left = threading.Event()

        def progress(which: str, text: str) -> None:
            if left.is_set():
                raise Stopped
            told.put((which, text))

        def work() -> None:
            try:
                told.put(("", render(self.analyse(prompt, max_new_tokens, off, progress=progress))))
            except UserError as error:
                told.put(("", message(str(error))))
            except Stopped:
                pass
            finally:
                # on any error, release the waiting client
                told.put(("", message("The analysis failed; the terminal says why.")))

        threading.Thread(target=work, daemon=True, name="alter-inspector").start()
        texts = {"base": "", "unlearned": ""}
        try:
            while True:
                which, text = told.get()
                if not which:
                    yield text
                    return
                texts[which] = text
                if told.empty():
                    yield render_begun(texts["base"], texts["unlearned"])
        finally:
            left.set()

    def choices(self) -> list[tuple[str, int]]:
        """Return the requests to choose from, as the database has them now: label and id."""
        assert self.store is not None
        return [(f"{r.name}: {r.subject} ({r.state})", r.id) for r in self.store.requests()]

    def request(self, number: int | None) -> str:
        """Return HTML of a request, or of what is wrong with it."""
        assert self.store is not None
        if number is None:
            return ""
        try:
            return render_request(self.store, self.store.get(number))
        except UserError as error:
            return message(str(error))


def _gradio() -> Any:
    # said before the import: it is read there
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError:
        raise UserError('alter inspect needs Gradio: pip install "alter-unlearning[ui]"') from None
    return gradio


def page(inspector: Inspector, max_new_tokens: int = 100) -> Any:
    """Build the Gradio Blocks around an inspector.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = _gradio()
    context = context_length(inspector.model)
    longest = MOST_NEW_TOKENS if context is None else min(MOST_NEW_TOKENS, context - 1)
    names = expert_names(inspector.model)
    with gr.Blocks(title="alter inspect", analytics_enabled=False) as blocks:
        gr.Markdown("# alter inspect\nWhat the model said before, what it says now, and why.")
        if inspector.about is not None:
            gr.HTML(render_about(inspector.about), elem_id="about", apply_default_css=False)
        with gr.Tab("Answers") if inspector.store is not None else nullcontext():
            prompt = gr.Textbox(label="Prompt", placeholder="Ask something", lines=2, elem_id="prompt", autofocus=True)
            if inspector.about is not None and inspector.about.questions:
                # buttons and not gr.Examples, which would write what is asked to a folder of its own
                gr.Markdown("Questions that were to be forgotten:")
                with gr.Row(elem_id="questions"):
                    for question in inspector.about.questions:
                        gr.Button(question, size="sm", elem_classes="question").click(
                            _same(question), outputs=prompt, api_visibility="private"
                        )
            with gr.Accordion("Switch experts off, length of the answer", open=False):
                off = gr.CheckboxGroup(
                    label="Switched off" if names else "Switched off (this adapter has no experts)",
                    choices=[(name, number) for number, name in enumerate(names)],
                    elem_id="off",
                    elem_classes="switches",
                )
                length = gr.Slider(
                    1,
                    longest,
                    value=min(max_new_tokens, longest),
                    step=1,
                    label="Longest answer (tokens)",
                    elem_id="length",
                )
            ask = gr.Button("Answer", variant="primary", elem_id="ask")
            gr.HTML(COLORS, elem_id="colors", apply_default_css=False)
            answers = gr.HTML(elem_id="answers", apply_default_css=False)
            shown = dict(
                inputs=[prompt, length, off], outputs=answers, api_visibility="private", concurrency_id="model"
            )
            gr.on([ask.click, prompt.submit], inspector.answer, **shown)

            def again(text: str, tokens: int, switched: list[int]) -> Iterator[str]:
                yield from inspector.answer(text, tokens, switched) if text.strip() else [""]

            off.input(again, trigger_mode="always_last", **shown)
        if inspector.store is not None:
            _requests(gr, inspector)
    return blocks


def _same(text: str) -> Callable[[], str]:
    return lambda: text


def _requests(gr: Any, inspector: Inspector) -> None:
    """Build the second tab: choose a request, see its evidence."""
    with gr.Tab("Requests"):
        chosen = gr.Dropdown(label="Request", choices=inspector.choices(), value=None, elem_id="request")
        refresh = gr.Button("Read the database again", elem_id="refresh", size="sm")
        view = gr.HTML(elem_id="evidence", apply_default_css=False)

        def read(number: int | None) -> tuple[Any, str]:
            try:
                return gr.update(choices=inspector.choices()), inspector.request(number)
            except UserError as error:
                return gr.update(), message(str(error))

        chosen.input(inspector.request, chosen, view, api_visibility="private")
        refresh.click(read, chosen, [chosen, view], api_visibility="private")


KEYS = """
document.addEventListener("keydown", event => {
  const here = event.target.closest ? event.target.closest(".alter .token") : null;
  if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
  const all = [...here.parentNode.querySelectorAll(".token")];
  const steps = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -all.length, End: all.length};
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = all[Math.min(Math.max(all.indexOf(here) + steps[event.key], 0), all.length - 1)];
  here.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
"""
"""Tokens are one stop of the Tab key; arrow keys, Home and End go along them."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""Content security policy: whatever is in the page, a browser asks no other host."""


def inspector_application(blocks: Any, host: str = "127.0.0.1", allowed: Sequence[str] = ()) -> Any:
    """Build the web application around the page: it fetches from no other host, and answers under its own names only
    (`HostGuard`).
    """
    gr = _gradio()
    from fastapi import FastAPI

    app = FastAPI(title="alter", docs_url=None, redoc_url=None, openapi_url=None)

    async def guard(request: Any, forward: Callable[[Any], Any]) -> Any:
        response = await forward(request)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    app.middleware("http")(guard)
    app.add_middleware(HostGuard, host=host, allowed=allowed)
    return gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        server_name=host,
        footer_links=[],
        run_history=False,
        max_file_size="1kb",
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        theme=gr.themes.Default(
            primary_hue="blue",
            font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
            font_mono=["ui-monospace", "Consolas", "monospace"],
        ).set(button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700"),
        css=STYLE,
        head=f"<script>{KEYS}</script>",
    )


def inspect(settings: Inspect) -> None:
    """Run `alter inspect` until it is told to stop.

    Raises:
        UserError: Gradio is not installed, the port is taken, the database is not one of requests, or what `ModelSettings.load`
            and `check_adapted` raise.
    """
    _gradio()
    import uvicorn

    listener = listen(settings.host, settings.port)
    store = None if settings.db is None else Store.open(settings.db)
    model, tokenizer = settings.load()
    inspector = Inspector(model, tokenizer, store, about(settings, model))
    app = inspector_application(page(inspector, settings.max_new_tokens), settings.host, settings.allowed_hosts)
    print(
        f"{Path(settings.adapter).name}: {address(settings.host, listener)} (Ctrl-C stops)",
        file=sys.stderr,
        flush=True,
    )
    uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run(sockets=[listener])
