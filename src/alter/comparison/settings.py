"""Settings of `alter compare`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, model_validator

from alter.settings import BatchSize, Count, OutFolder, Passes, Rows, Seed, Steps

OWN = "rows"
"""What tables call the rows of `forget`, where they call others by TOFU's split."""


class Retrained(BaseModel):
    """Models retrained without the forget set, one for each split; without one a split has no forget quality."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    forget01: str | None = None
    """Model trained on retain99."""
    forget05: str | None = None
    """Model trained on retain95."""
    forget10: str | None = None
    """Model trained on retain90."""
    rows: str | None = None
    """Model trained without the rows of `forget`."""


class Ray(BaseModel):
    """Cells as tasks of a Ray cluster, whose machines share the comparison's folder."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    address: str = "auto"
    """Address of the cluster: host:port, ray://host:port, or auto for the one that this machine belongs to."""
    cpus: Count = Field(2, ge=1)
    """Cores that a cell takes."""
    gpus: float = Field(0, ge=0)
    """GPUs that a cell takes; below one, cells share a GPU."""
    retries: Count = Field(3, ge=0)
    """How often a cell is started again when its machine is lost."""

    @model_validator(mode="after")
    def _whole(self) -> Ray:
        if self.gpus > 1 and not self.gpus.is_integer():
            raise ValueError(f"`ray.gpus` is {self.gpus:g}; Ray gives a cell a whole number, or a part of one GPU")
        return self


class Slurm(BaseModel):
    """Cells as jobs of Slurm, whose machines share the comparison's folder."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    partition: str | None = None
    """Where jobs are queued; the cluster's default if not given."""
    cpus: Count = Field(2, ge=1)
    """Cores that a cell takes."""
    gpus: Count = Field(0, ge=0)
    """GPUs that a cell takes."""
    memory_gb: Count | None = Field(None, ge=1)
    """Memory that a cell takes, in GB; the cluster's default if not given."""
    options: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """Further options of `sbatch`, by their long names: account, qos, constraint, ... In a recipe only."""


class Survival(BaseModel):
    """What survives: how far a method disturbs the model, and what an attacker who relearns some rows gets of the others."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    rows: Rows = Field(0, ge=0)
    """Forget rows of each part that the attacker trains on; the others are asked. 0: no attack and no disturbance."""
    bound: float | None = Field(None, gt=0)
    """Choose the setting with the least leak after the attack among those with at most this disturbance, in nats a token;
    none: by forgetting and utility before any attack."""
    passes: Count = Field(2, ge=1)
    """Passes over the attacker's rows."""
    learning_rate: float = Field(2e-5, gt=0)
    """AdamW's learning rate of all weights; 2e-5 suits models of billions of weights, a small one needs more."""
    batch_size: BatchSize = Field(10, ge=1)
    """Rows a step."""
    samples: Count = Field(16, ge=1)
    """Replies sampled to each question."""
    k: Count = Field(16, ge=1)
    """k of leak@k: one reply of k that gives the answer is a leak."""
    questions: Rows = Field(40, ge=1)
    """Rows that are asked, at most."""

    @model_validator(mode="after")
    def _possible(self) -> Survival:
        if self.bound is not None and not self.rows:
            raise ValueError(
                "`survival.bound` chooses by the leak after an attack, but the attacker has no rows: give `survival.rows`"
            )
        if self.k > self.samples:
            raise ValueError(
                f"`survival.k` is {self.k}, more than the {self.samples} samples: take fewer, or sample more"
            )
        return self


class Compare(BaseModel):
    """Run methods with equal search budget on TOFU or rows of your own, choose each one's setting on validation rows, report on others."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """Model that must forget: local folder, hub id, or builtin:NAME."""
    methods: list[str]
    """Rows of the table: methods of `alter unlearn --method`, or names that `settings` explains."""
    out: OutFolder
    """Folder of the comparison; the same command resumes where it stopped."""
    splits: list[Literal["forget01", "forget05", "forget10"]] = ["forget10"]
    """What to forget."""
    forget: str | None = None
    """Rows of your own to forget in the place of TOFU's splits: any source of rows. They need `retain`; tables call them `rows`."""
    retain: str | None = None
    """What every run keeps, where the model has learned other rows than TOFU's own retain set of the split: a source of
    rows, such as builtin:full[:600]. By default that set."""
    seeds: list[Seed] = [0, 1, 2]
    """Seeds of the runs."""
    search_seeds: Count | None = Field(None, ge=1)
    """Search the grid with this many of the seeds, and run the others with the chosen setting only; all by default."""
    rates: list[Annotated[float, Field(gt=0, le=1e6)]] = [0.3, 1.0, 3.0]
    """Grid: multiples of each method's own learning rates."""
    refine: Count = Field(0, ge=0)
    """Search so many rates more, one after the other, where each method's search points: between its best rate and the
    neighbour that forgets more, or beyond the best where that is the last of its rates and forgets most."""
    epochs: list[Annotated[Passes, Field(gt=0)]] = [5.0]
    """Grid: passes over the forget set, the same for every method."""
    least_steps: Steps = Field(0, ge=0)
    """A run that would be shorter than so many steps passes over its forget set more often, whatever `epochs` says."""
    continual: bool = False
    """Forget the splits one after the other, each run starting from the last one's result, on the rows that are new."""
    common: Annotated[dict[str, Any], tyro.conf.Fixed] = Field(default_factory=dict)
    """Settings of `alter unlearn` for every run, above those of its method. In a recipe only."""
    settings: Annotated[dict[str, dict[str, Any]], tyro.conf.Fixed] = Field(default_factory=dict)
    """Settings of `alter unlearn` by row of the table, above all others; `method` says what is built on. With `distill`, settings of
    `alter distill`, a row is the plain weights that learn from its unlearned model. Recipe only."""
    retrained: Retrained = Field(default_factory=Retrained)
    data: str = "builtin"
    """TOFU's rows: the copy that comes with this package, a folder with its files, or a hub id."""
    holdout: str | None = None
    """Questions and answers that no model saw, for the choice where a split has no retrained model."""
    validation: float = Field(0.3, gt=0, lt=1)
    """Share of the authors whose rows serve for the choice; all others' rows serve for the table. Of your own rows those of one value of
    `common.domain_column` stay together."""
    division_seed: Seed = 0
    """Draws those authors."""
    utility_floor: float = Field(0.95, ge=0)
    """The choice is among settings that keep this share of the original model's utility."""
    survival: Survival = Field(default_factory=Survival)
    limit: Rows | None = Field(None, ge=1)
    """Evaluate only so many rows of each set and part, to save time."""
    executor: Literal["local", "ray", "slurm"] = "local"
    """Where the cells run: on this machine, on a Ray cluster, or as jobs of Slurm."""
    ray: Ray = Field(default_factory=Ray)
    slurm: Slurm = Field(default_factory=Slurm)
    workers: Count | None = Field(None, ge=1)
    """Cells at a time; on this machine by default one a GPU, else one for two cores; on a cluster all that it takes."""
    minutes: Steps | None = Field(None, ge=2)
    """Time limit of a cell: one that takes longer is ended, and named under the table. By default there is none, but Slurm's jobs get
    240; of theirs Slurm takes up to 70 seconds off."""
    keep: bool = False
    """Keep each cell's weights to the end."""
    run: bool = True
    """Run the cells; `run=False` only writes the tables of those that have finished."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """What the cells run on; on all visible GPUs by default if there are any, else on the CPU."""

    @property
    def forgotten(self) -> list[str]:
        """What is forgotten, as tables name it: splits of TOFU, or `rows`."""
        return list(self.splits) if self.forget is None else [OWN]

    @property
    def benchmark(self) -> str:
        """The benchmark whose figures the table has."""
        return "tofu" if self.forget is None else "rows"

    @property
    def cells_on(self) -> str | None:
        """What the cells run on: `device`, or on a cluster what they ask it for, since this machine may have no GPU; None: what there is."""
        if self.device is not None or self.executor == "local":
            return self.device
        return "cuda" if (self.ray if self.executor == "ray" else self.slurm).gpus else "cpu"
