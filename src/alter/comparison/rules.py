"""How a comparison was made, in words: the rules under its tables."""

from __future__ import annotations

from collections.abc import Mapping

from alter import metrics
from alter.comparison.choice import CRITERIA, criterion
from alter.comparison.distilling import distilled_rule
from alter.comparison.settings import OWN, Compare
from alter.evaluation import added_to


def rules(settings: Compare, divided: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Describe how the numbers were made, a sentence or two a line."""
    least = f", at least {settings.least_steps} steps" if settings.least_steps else ""
    more = (
        f" and {settings.refine} more, one after the other: between the best rate and the neighbour that forgets more, or "
        "beyond the best where it is the last and forgets most"
        if settings.refine
        else ""
    )
    return [
        f"Model {settings.model}, seeds {', '.join(map(str, settings.seeds))}; mean ± standard deviation over seeds, "
        f"of one run the figure and in brackets its 95 % interval over {_drawn(settings)}. "
        "Numbers are of test rows. Bold utility: no other method of this split is at least as good in forgetting and "
        "utility, and better in one of them, not even were this one's figures worse by their standard deviation. Fluency: "
        "distinct-2 and repetition besides.",
        f"Search budget, the same for every method and split: {len(settings.rates) * len(settings.epochs)} settings "
        f"(learning rates × {', '.join(f'{r:g}' for r in settings.rates)}; epochs "
        f"{', '.join(f'{e:g}' for e in settings.epochs)}{least}){more}, seeds searched: "
        f"{', '.join(map(str, settings.seeds[: settings.search_seeds]))}.",
        _choice_rule(settings),
        *(
            [
                f"Continual: {', then '.join(settings.forgotten)}; each run forgets the rows that are new and starts from the "
                "last one's result. The setting is the same for all and chosen by where the chain ends."
            ]
            if settings.continual
            else []
        ),
        *(
            f"{split}: forgetting is {_criterion(settings, split)}. "
            f"{divided[split]['validation']} forget rows for validation, {divided[split]['test']} for test."
            for split in settings.forgotten
        ),
        _division_rule(settings),
        *([_survival_rule(settings)] if settings.survival.rows else []),
        *(f"{name}, of a plugin: {metrics.CATALOGUE[name].meaning}." for name in added_to(settings.benchmark)),
        *distilled_rule(settings),
        *([f"Only {settings.limit} rows of each set and part were evaluated."] if settings.limit else []),
        "Wall time: the run without loading Python and without evaluation, beside the other workers' cells. Peak memory: "
        "of the run's process (of the GPU, where there is one).",
    ]


def _criterion(settings: Compare, split: str) -> str:
    """Describe how far a setting has forgotten is told."""
    own = split == OWN
    named = {
        "ratios": "true answers' probabilities" if own else "truth ratios",
        "attack": "the loss" if own else "min-k",
    }
    return CRITERIA[criterion(settings, split)].format(**named)


def _drawn(settings: Compare) -> str:
    """Describe what intervals draw: rows, or all rows of a subject together."""
    column = "author" if settings.forget is None else settings.common.get("domain_column")
    together = "" if column is None else f", of which those of one {column} are drawn together (not for an AUC)"
    return f"rows{together}"


def _division_rule(settings: Compare) -> str:
    """Describe how rows are divided, and of rows of one's own what stands for TOFU's figures."""
    shuffled = f"shuffled by seed {settings.division_seed}, {settings.validation:.0%} of them for validation"
    if settings.forget is None:
        return f"Division: authors {shuffled} (rows of no TOFU author: each answer is its own author)."
    column = settings.common.get("domain_column")
    units = "rows" if column is None else f"values of {column}"
    return (
        f"Division: {units} {shuffled}. Forget quality compares the true answers' probabilities with the retrained model's, and utility "
        "is the harmonic mean of probability and ROUGE-L of the rows to keep: these rows have no wrong answers, of which TOFU's figures are made."
    )


def _choice_rule(settings: Compare) -> str:
    """Describe how a setting is chosen."""
    before = "Chosen on validation rows, by method and split: the setting that"
    if settings.survival.bound is not None:
        return (
            f"{before} leaks least after the attack among those that disturb the model by at most "
            f"{settings.survival.bound:g} nats a token; where none does, the largest (1 - leak) × exp(-disturbance); of "
            "equals the first searched."
        )
    return (
        f"{before} forgets best among those that keep {settings.utility_floor:.0%} of the original's utility; where none "
        "does, the largest forgetting × utility; of equals the first searched."
    )


def _survival_rule(settings: Compare) -> str:
    """Describe the columns of the attack."""
    how = settings.survival
    return (
        "Disturbance: mean KL divergence from the original's next-token distributions on ordinary text. Leak: chance that one "
        f"of {how.k} sampled replies gives the answer, before and after all weights were trained on {how.rows} forget rows of "
        f"the part ({how.passes} passes at {how.learning_rate:g}); asked are up to {how.questions} of the others. The attacker "
        "keeps an adapter in place: what the base still knows is not in it."
    )
