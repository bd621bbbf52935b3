"""Agents that look over each answer before it is given (ALU, Sanyal and Mandal 2025, arXiv:2502.00406)."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from alter.core import UserError
from alter.data import Example, encode_prompt
from alter.inference import Finite, check_prompts, context_length, stop_ids
from alter.models.guards.form import Guard, OfPrompt, layers_behind

Ask = Callable[[str, str], str]
"""What a language model replies to an instruction and a message."""

DETECT = (
    "You check answers of a language model. It must give away nothing about these: {targets}. Reply with those of them about "
    "which the answer says something, separated by semicolons, or with NONE."
)
REWRITE = (
    "Rewrite the answer so that it says nothing about these: {targets}. Neither name them nor hint at them; keep whatever else "
    "answers the question. Reply with the new answer alone. This is version {number}: word it in your own way."
)
CRITIC = (
    "An answer must give away nothing about these: {targets}. Grade it: 5 = it says nothing about them and answers well; "
    "3 = it hints at them; 1 = it gives them away. Reply with one digit."
)
MERGE = "Merge these versions of an answer into one. It must say nothing about these: {targets}. Reply with the merged answer alone."
ANSWERED = "Question: {question}\nAnswer: {answer}"


def grade_of(reply: str) -> int:
    """Return the first digit 1 to 5 in a critic's reply; 1 if there is none, so that an ungraded text is withheld."""
    found = re.search(r"(?<!\d)[1-5](?!\d)", reply)
    return int(found[0]) if found else 1


def looked_over(
    ask: Ask,
    question: str,
    answer: str,
    *,
    targets: Sequence[str],
    rewrites: int,
    best: int,
    least: float,
    refusal: str,
) -> str | None:
    """Return the replacement of an answer, or None if it may stay as it is.

    One call asks which targets the answer says something about. Of an answer that names some, `rewrites` versions are made and
    graded 1 to 5, each by a call; the `best` of them stay. With a mean grade below `least` the refusal is said, else they are
    merged by one more call.

    Args:
        ask: the agents' language model.
        question, answer: what was asked, and what the model would say.
        targets: what must not be said anything about.
        rewrites: versions; the paper's 5.
        best: that are merged; the paper's 3.
        least: mean grade; the paper's 4.
        refusal: see above.
    """
    told = {"question": question, "answer": answer}
    found = ask(DETECT.format(targets="; ".join(targets)), ANSWERED.format(**told))
    named = [target for target in targets if target.casefold() in found.casefold()]
    if not named and not any(target.casefold() in answer.casefold() for target in targets):
        return None
    names = "; ".join(named or targets)
    versions = [
        ask(REWRITE.format(targets=names, number=number), ANSWERED.format(**told)) for number in range(1, rewrites + 1)
    ]
    grades = [
        grade_of(ask(CRITIC.format(targets=names), ANSWERED.format(question=question, answer=version)))
        for version in versions
    ]
    # of equal grades the earlier version
    kept = sorted(range(rewrites), key=lambda i: -grades[i])[:best]
    if sum(grades[i] for i in kept) / len(kept) < least:
        return refusal
    return ask(MERGE.format(targets=names), f"Question: {question}\n" + "\n".join(f"- {versions[i]}" for i in kept))


def endpoint(settings: Mapping[str, Any]) -> Ask:
    """Connect to a language model behind an OpenAI-compatible endpoint: `url`, `model`, and `key_variable`, which holds its key.

    Raises:
        UserError: no `openai` library, or no key.
    """
    try:
        import openai
    except ImportError:
        raise UserError(
            'Agents at an endpoint need the openai library: pip install "alter-unlearning[judge]".'
        ) from None
    key = "none" if settings["key_variable"] is None else os.environ.get(settings["key_variable"])
    if not key:
        raise UserError(
            f"The environment variable {settings['key_variable']} holds no API key for the guard's agents."
        )
    client = openai.OpenAI(base_url=settings["url"], api_key=key, timeout=60, max_retries=3)

    def ask(instruction: str, message: str) -> str:
        turns = [{"role": "system", "content": instruction}, {"role": "user", "content": message}]
        try:
            said = client.chat.completions.create(
                model=settings["model"], messages=turns, temperature=0, max_tokens=settings["longest"]
            )
        except openai.OpenAIError as error:
            raise UserError(
                f"The guard's agents at {settings['url']} do not answer ({error}): no answer is given."
            ) from None
        return (said.choices[0].message.content or "").strip()

    return ask


class Agents(Guard):
    """A model whose greedy answer agents look over before its first token is given; it says what they leave, word for word.

    While it generates, the logits allow the next token of that text alone, whatever the temperature. Without a cache, when rows
    are scored, they are the base's: agents change what is said, not what the model knows. Hidden states are the base's.

    Args:
        base: the model.
        settings: targets, rewrites, best, least, refusal, longest, and url, model and key_variable of the endpoint; without a
            url the model itself is asked.
    """

    kind: ClassVar[str] = "agents"
    reads_text: ClassVar[bool] = True
    answers_alone: ClassVar[bool] = True
    _is_stateful = True

    def __init__(self, base: Any, settings: dict[str, Any]) -> None:
        super().__init__(base)
        self.settings = settings
        self.ask: Ask = self.ask_itself if settings["url"] is None else endpoint(settings)

    @classmethod
    def read(cls, base: Any, path: Path, settings: dict[str, Any]) -> Agents:
        """See `Guard.read`."""
        return cls(base, settings)

    def greedy(self, ids: list[int]) -> list[int]:
        """Return the untouched model's greedy reply to a prompt, at most `longest` tokens, without its end token.

        Raises:
            UserError: the prompt leaves no room for a reply in the model's context, or the model's logits are not finite.
        """
        context, longest = context_length(self.base), self.settings["longest"]
        most = longest if context is None else max(1, min(longest, context - len(ids)))
        check_prompts(self.base, [ids], most, ["What the guard's agents are asked"])
        row, stop = torch.tensor([ids], device=self.device), stop_ids(self.base, self.tokenizer)
        how = {
            "do_sample": False,
            "num_beams": 1,
            "temperature": None,
            "top_p": None,
            "top_k": None,
            "use_cache": True,
            "logits_processor": LogitsProcessorList([Finite(self.base)]),
        }
        whole = self.base.generate(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            max_new_tokens=most,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(stop),
            **how,
        )
        said: list[int] = whole[0, len(ids) :].tolist()
        return said[: next((t for t, token in enumerate(said) if token in stop), len(said))]

    def ask_itself(self, instruction: str, message: str) -> str:
        """Return the untouched model's greedy reply to a text."""
        ids = encode_prompt(self.tokenizer, Example(f"{instruction}\n\n{message}", "", "qa"))
        return self._text(self.greedy(ids))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def answer(self, ids: list[int]) -> list[int]:
        """Return the tokens of the reply to a prompt, with the end token."""
        given = self.settings
        vanilla = self.greedy(ids)
        how = {name: given[name] for name in ("targets", "rewrites", "best", "least", "refusal")}
        said = looked_over(self.ask, self._text(ids), self._text(vanilla), **how)
        if said is not None:
            vanilla = self.tokenizer(said, add_special_tokens=False).input_ids[: given["longest"]]
        return [*vanilla, self.tokenizer.eos_token_id]

    def unlearned(self, inputs: dict[str, Any], cache: DynamicCache | None, decision: Tensor | None) -> Any:
        """See `Guard.unlearned`."""
        if cache is None:
            return self.untouched(inputs, cache)
        kept = layers_behind(cache, self.config.num_hidden_layers, 1, OfPrompt)[0]
        ids, mask, before = inputs["input_ids"], inputs["attention_mask"], cache.get_seq_length()
        if not kept.is_initialized:
            mask = torch.ones_like(ids) if mask is None else mask
            rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
            said = [torch.tensor([ids.shape[1], *self.answer(row)]) for row in rows]
            # the prompts' width, then the answer, which goes on with its last token: the ending one
            longest = max(len(row) for row in said)
            held = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in said])
            kept.update(*[held.to(ids.device).double()[:, None, :, None]] * 2)
        out = self.untouched(inputs, cache)
        held = kept.keys[:, 0, :, 0].long()
        shown, lowest = out.logits.shape[1], torch.finfo(out.logits.dtype).min
        for place in range(shown):
            # which token of the answer the output at this place chooses; before the prompt's last, none
            number = before + ids.shape[1] - shown + place + 1 - int(held[0, 0])
            if number >= 0:
                token = held[:, min(1 + number, held.shape[1] - 1), None]
                out.logits[:, place] = torch.full_like(out.logits[:, place], lowest).scatter(1, token, 0.0)
        return out
