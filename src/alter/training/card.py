"""The model card of a run's result."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from alter.methods import presets
from alter.methods.adapters import (
    AlterAdapter,
    AssistantLora,
    FullWeights,
    Lora,
)
from alter.methods.initializers import Zero
from alter.models import gguf
from alter.training.settings import Unlearn


def card(run: Unlearn, names: Sequence[str]) -> str:
    """The result's model card: what it is, how to load it, what it was trained with, and what it does not do."""
    settings = yaml.safe_dump(run.model_dump(mode="json", exclude={"resume", "overwrite"}), sort_keys=False)
    title = "ALTER" if run.method is None else presets.METHODS[run.method].title
    head = f"---\nlibrary_name: {{library}}\nbase_model: {run.model}\ntags: [alter, unlearning]\n---\n\n"
    tail = f"\n## Settings\n\n```yaml\n{settings}```\n"
    if isinstance(run.adapter, FullWeights):
        return f"""{head.format(library="transformers")}# {run.model}, made to forget {run.forget}

{title}; adapter.kind full: these are the model's own weights, changed. `AutoModelForCausalLM.from_pretrained` loads them.
{tail}"""
    if isinstance(run.adapter, AssistantLora) or (isinstance(run.adapter, Lora) and run.adapter.detector):
        about = (
            "a LoRA adapter (`lora`), which detectors switch for each input, one for each request so far. "
            "`detector.safetensors` holds mean hidden states of the forget rows: whoever has it can recognise them"
        )
        if isinstance(run.adapter, AssistantLora):
            about = "a LoRA adapter (`lora`) that makes an assistant, which is taken from the model's logits"
        return f"""{head.format(library="peft")}# {"Assistant" if isinstance(run.adapter, AssistantLora) else "Adapter"}: makes {run.model} forget {run.forget}

{title}: {about}.

```python
import alter

model, tokenizer = alter.load({run.model!r}, "this folder")
```
{tail}"""
    parts = "" if run.method is None else f"{title}; "
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    about = f"{parts}adapter.kind {run.adapter.kind}."
    base = "It loads on no other base: the configuration holds a fingerprint of the weights. "
    merging = "A routed adapter cannot be merged."
    if isinstance(run.adapter, AlterAdapter):
        about = f"{parts}{len(names)} sub-domains, one forgetting expert each: {shown}."
    if isinstance(run.adapter, Lora):
        base = ""
        merging = "It can be merged."
        if not isinstance(run.initializer, Zero):
            about += (
                f" It starts by {run.initializer.kind}: the second half of its rank is the negated start, frozen, in place "
                "of a changed base model, so that the adapter switched off is the original model."
            )
    load = f"""import alter  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({run.model!r}), "this folder")"""
    if run.model.startswith("builtin:") or run.model.lower().endswith(gguf.ENDING):
        # transformers reads neither by that name
        load = f"""import alter

model, tokenizer = alter.load({run.model!r}, "this folder")"""
    return f"""{head.format(library="peft")}# {"ALTER adapter" if isinstance(run.adapter, AlterAdapter) else "Adapter"}: makes {run.model} forget {run.forget}

{about}

```python
{load}
```

{base}It is an adapter: whoever has the base
weights has the knowledge, and `disable_adapter()` brings it back. {merging}
{tail}"""
