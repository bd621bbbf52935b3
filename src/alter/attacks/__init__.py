"""Attacks that try to recover what was forgotten, each measured beside the original and the retrained model.

Each attack is a function, registered in `techniques` with what it needs of the attacker. By prompt: `wording`,
`talking`, `searching`. By weights: `weights`, `pruning`. By hidden states: `states`, `depth`. `base` is what they
share, `fractions` the recovered fraction, `recovery` when it counts; `settings`, `run` and `showing` are `alter attack`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from alter.core import lazy

if TYPE_CHECKING:
    from alter.attacks import depth as depth
    from alter.attacks import states as states
    from alter.attacks.base import Bench as Bench
    from alter.attacks.base import Item as Item
    from alter.attacks.recovery import RECOVERED as RECOVERED
    from alter.attacks.recovery import recovers as recovers
    from alter.attacks.run import attack as attack
    from alter.attacks.settings import Attack as Attack
    from alter.attacks.showing import KNOWN_LOSS as KNOWN_LOSS
    from alter.attacks.showing import LEARNED as LEARNED
    from alter.attacks.showing import loss_ends as loss_ends
    from alter.attacks.showing import untrained as untrained
    from alter.attacks.techniques import ATTACKS as ATTACKS
    from alter.attacks.weights import quantize as quantize
    from alter.attacks.weights import train_steps as train_steps

lazy(globals())
