"""Settings of watching a run."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator

from alter.evaluation import Leak
from alter.settings import Passes, Rows, Steps, Tokens
from alter.training.rules import KeepLast, Rule


class Watch(BaseModel):
    """What to measure while training, how often, and which step to keep. Off unless an interval is given."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    every_steps: Steps | None = Field(None, ge=1)
    """Steps between checks; also checks before the first step and after the last."""
    every_epoch: Passes | None = Field(None, gt=0)
    """The same in passes over the forget set: 0.5 checks twice a pass."""
    rule: Rule = Field(default_factory=KeepLast)
    """Which step to keep, and when to stop: none, holdout, reference."""
    stop: bool = True
    """End training when the rule is satisfied; without it, train to the end and then keep the best step."""
    forget: str | None = None
    """Forget rows with paraphrased_answer and perturbed_answer, for truth ratios: builtin:forget10_perturbed."""
    forget_rows: Rows = Field(200, ge=1)
    """Forget rows to look at, drawn by the seed."""
    retain: str | None = None
    """Retain rows that are not in the retain set; by default `watch.retain_rows` of the retain set are not trained on."""
    retain_rows: Rows = Field(100, ge=1)
    """Retain rows to look at. Set aside from the retain set, a fifth of it at most, unless `watch.retain` gives them."""
    holdout: str | None = None
    """Rows of the forget set's kind that the model has never seen."""
    holdout_rows: Rows = Field(200, ge=1)
    """Holdout rows to look at, drawn by the seed."""
    calibrate: str | None = None
    """A model of the same tokenizer that saw neither forget nor holdout rows: loss and min-k count beyond its own."""
    retain_records: str | None = None
    """Result file (`alter evaluate --json`) of a model retrained without the forget set: gives forget quality."""
    replies: Rows = Field(0, ge=0)
    """Forget and holdout rows to answer at each check, for ROUGE-L."""
    reply_tokens: Tokens = Field(100, ge=1)
    """Longest such answer, in tokens."""
    leak: Leak = Field(default_factory=Leak)
    """Leakage over many samples of the forget rows, at each check: leak@k."""

    @property
    def on(self) -> bool:
        """Whether the run is watched at all."""
        return self.every_steps is not None or self.every_epoch is not None

    @model_validator(mode="after")
    def _complete(self) -> Watch:
        if self.every_steps is not None and self.every_epoch is not None:
            raise ValueError("give either `watch.every_steps` or `watch.every_epoch`, not both")
        data = [name for name in ("forget", "retain", "holdout", "calibrate", "retain_records") if getattr(self, name)]
        if not self.on and (data or self.rule.kind != "none"):
            raise ValueError("nothing is watched without `watch.every_steps` or `watch.every_epoch`: give one of them")
        if self.leak.samples and not self.on:
            raise ValueError(
                "watch.leak samples at each check: give `watch.every_steps` or `watch.every_epoch` as well"
            )
        for name in self.rule.needs:
            if getattr(self, name) is None:
                raise ValueError(f"`watch.rule.kind` {self.rule.kind!r} needs `watch.{name}`")
        if self.retain_records is not None and self.forget is None:
            raise ValueError(
                "`watch.retain_records` compares truth ratios: give the forget rows with paraphrased and perturbed "
                "answers as `watch.forget`, for example builtin:forget10_perturbed"
            )
        if self.calibrate is not None and self.holdout is None:
            raise ValueError(
                "`watch.calibrate` makes forget and holdout rows comparable: give `watch.holdout` as well"
            )
        return self
