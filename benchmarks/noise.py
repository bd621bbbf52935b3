"""How far UNDO's damage moves a model, and what of it does: shrinking matrices, shrinking vectors, or the noise.

python benchmarks/noise.py        # tofu-mini, 8 rows to keep; a few seconds

Each figure is the mean KL in nats of the whole model from the damaged one, over every token of the rows.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor

from alter.data.encoding import encode
from alter.data.rows import load_examples
from alter.distillation.noise import Noise, add_noise
from alter.distillation.teacher import kl_of_logits
from alter.models.loading import load_model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:tofu-mini/original")
    parser.add_argument("--rows", default="builtin:retain90[:8]")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, dtype="float32")
    rows = [encode(tokenizer, row).input_ids for row in load_examples(args.rows)]

    @torch.no_grad()
    def logits(network: torch.nn.Module) -> Tensor:
        return torch.cat([network(torch.tensor([ids])).logits[0] for ids in rows])

    whole = logits(model)
    print(f"{'alpha':>6} {'beta':>6} {'all':>8} {'vectors left whole':>20} {'noise alone':>12}")
    for alpha, beta in ((0.1, 0.05), (0.1, 1.0), (0.3, 0.05), (0.3, 1.0)):
        figures = []
        for vectors, shrunk in ((True, True), (False, True), (False, False)):
            damaged = copy.deepcopy(model)
            add_noise(damaged, Noise(alpha=alpha, beta=beta, vectors=vectors), 0)
            if not shrunk:
                with torch.no_grad():
                    for weight, before in zip(damaged.parameters(), model.parameters(), strict=True):
                        weight.add_(alpha * before if weight.dim() >= 2 else 0.0)
            figures.append(float(kl_of_logits(whole, logits(damaged)).mean()))
        print(f"{alpha:>6} {beta:>6} {figures[0]:>8.3f} {figures[1]:>20.3f} {figures[2]:>12.3f}")


if __name__ == "__main__":
    main()
