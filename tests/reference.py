"""Naive twins: each numerical function once more, in loops and float64, to be compared with."""

import math

# ---- entropy ---------------------------------------------------------------------------------------------------------


def naive_softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / math.fsum(weights) for w in weights]


def naive_tsallis(logits, q):
    """S_q by its definition, with arithmetic of 60 digits, so that the limit q -> 1 does not cancel."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 60
        weights = [Decimal(x).exp() for x in logits]
        total = sum(weights)
        p = [w / total for w in weights]
        if q == 1.0:
            return float(-sum(x * x.ln() for x in p))
        order = Decimal(q)
        return float((1 - sum((x.ln() * order).exp() for x in p)) / (order - 1))
