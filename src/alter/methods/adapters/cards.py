"""Model card texts that depend on the kind of adapter."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from alter.data import for_others
from alter.models import gguf


class Trained(Protocol):
    """The settings of a run that its card mentions."""

    model: str
    forget: str


class Card(NamedTuple):
    """Parts of a model card that depend on the kind: the loading library, the heading, and what the result is."""

    library: str
    heading: str
    text: str


FINGERPRINT = "It loads on no other base: the configuration holds a fingerprint of the weights. "
UNMERGED = " A routed adapter cannot be merged."


def titled(title: str | None) -> str:
    """Return a method's name as the start of a sentence; empty where it has none."""
    return "" if title is None else f"{title}; "


def own_loader(run: Trained) -> str:
    """Return Python code that loads the result through alter."""
    return f"""import alter

model, tokenizer = alter.load({run.model!r}, "this folder")"""


def peft_card(what: str, run: Trained, about: str, base: str = "", merging: str = "") -> Card:
    """Return the card of an adapter that PEFT loads.

    Args:
        what: sort of adapter, for the heading.
        run: the run's settings.
        about: what it is, in words.
        base: what is said of the base that it loads on.
        merging: whether it can be merged, in words.
    """
    load = f"""import alter  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({run.model!r}), "this folder")"""
    if run.model.startswith("builtin:") or run.model.lower().endswith(gguf.ENDING):
        # transformers reads neither by that name
        load = own_loader(run)
    text = f"""{about}

```python
{load}
```

{base}It is an adapter: whoever has the base
weights has the knowledge, and `disable_adapter()` brings it back.{merging}"""
    return Card("peft", f"{what}: makes {run.model} forget {for_others(run.forget)}", text)


def guarded_card(what: str, run: Trained, title: str | None, about: str) -> Card:
    """Return the card of a result that only alter loads (`alter.models.guards`); `title` is the method's name, if any."""
    text = f"""{title or "ALTER"}: {about}.

```python
{own_loader(run)}
```"""
    return Card("peft", f"{what}: makes {run.model} forget {for_others(run.forget)}", text)
