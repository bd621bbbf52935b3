"""A model in memory as lm-evaluation-harness calls it: batches by tokens, fp32, no prompt truncated."""

from __future__ import annotations

from typing import Any


def harness_model(
    model: Any, tokenizer: Any, *, batch_tokens: int | None = None, batch_size: int = 64, label: str = "answering"
) -> Any:
    """Return the harness's model (`HFLM`) around one that is loaded, with an ALTER adapter's routing active.

    The harness pads on the right and passes no attention mask. That is safe for causal models, routed ones too, since
    the route of a token depends on the tokens before it only. Unlike in the harness:

    * Batches hold `batch_tokens` padded tokens instead of a fixed number of rows, longest first.
    * Log-probabilities are fp32; the harness keeps the model's dtype, whose rounding can make letters tie.
    * A prompt that does not fit into the context is refused; the harness cuts off its beginning.
    * NaN is refused; the harness would take the first choice.

    Args:
        model, tokenizer: as in `alter.inference.scoring.score`.
        batch_tokens: padded tokens in a batch; None: 16384, or 4096 on a CPU.
        batch_size: prompts in a generation batch.
        label: name on the progress bar.
    """
    from alter.evaluation.harness.asking import HarnessModel

    return HarnessModel(model, tokenizer, batch_tokens, batch_size, label)
