"""Rounding that keeps what layers compute: against a plain loop with inverses, the package gguf's bytes, and changes smaller than a step."""

import copy

import gguf
import numpy as np
import pytest
import torch

from alter.exporting.rounding import BITS, BLOCK, DAMPING, calibration, round_blocks, rounded
from pico import PAD
from pico import pico as make_pico

FORMS = list(BITS)


def matrix(rows=5, size=64, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def moments_of(size=64, seed=1, count=300, rank=None):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or size, size, generator=draw, dtype=torch.float64)
    inputs = torch.randn(count, rank or size, generator=draw, dtype=torch.float64) @ mix
    return inputs.T @ inputs / count, inputs


def naive(weight, moments, form):
    """Column after column, with the inverse moments of the columns that are left computed anew each time."""
    bits = BITS[form]
    out, size = weight.shape
    left = weight.double().numpy().copy()
    damped = moments.numpy() + np.eye(size) * DAMPING * np.diag(moments.numpy()).mean()
    values = np.zeros((out, size))
    for o in range(out):
        row = left[o]
        for j in range(size):
            if j % BLOCK == 0:
                block = row[j : j + BLOCK]
                if form.endswith("_1"):
                    scale = float(np.float16((block.max() - block.min()) / (2**bits - 1)))
                    offset = float(np.float16(block.min()))
                else:
                    scale = float(np.float16(block[np.abs(block).argmax()] / -(2 ** (bits - 1))))
                    offset = -(2 ** (bits - 1)) * scale
            code = min(max(np.round((row[j] - offset) / (scale or 1.0)), 0), 2**bits - 1)
            values[o, j] = scale * code + offset
            inverse = np.linalg.inv(damped[j:, j:])
            row[j:] -= (row[j] - values[o, j]) / inverse[0, 0] * inverse[0]
    return values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "size"), [(1, 32), (3, 96)])
def test_rounding_is_that_of_a_plain_loop(form, rows, size):
    weight, (moments, _) = matrix(rows, size), moments_of(size)
    found = rounded(weight, moments, form)
    assert found.values().double().numpy() == pytest.approx(naive(weight, moments, form), abs=1e-6)
    assert found.codes.shape == (rows, size)
    assert int(found.codes.max()) <= 2 ** BITS[form] - 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_read_back_by_gguf(form, dtype):
    found = rounded(matrix(7, 96).to(dtype), moments_of(96)[0], form)
    read = gguf.dequantize(found.packed(), gguf.GGMLQuantizationType[form.upper()])
    assert np.array_equal(read, found.values().numpy())
    order = torch.tensor([6, 0, 5, 1, 4, 2, 3])
    read = gguf.dequantize(found.rows(order).packed(), gguf.GGMLQuantizationType[form.upper()])
    assert np.array_equal(read, found.values().numpy()[order])


@pytest.mark.parametrize("form", FORMS)
def test_inputs_that_go_their_own_ways_give_the_nearest_steps(form):
    weight = matrix(4, 64)
    found = rounded(weight, torch.eye(64), form)
    kind = gguf.GGMLQuantizationType[form.upper()]
    assert np.array_equal(found.packed(), gguf.quantize(weight.numpy(), kind))


@pytest.mark.parametrize("form", FORMS)
def test_constant_and_zero_blocks_stay_what_they_are(form):
    weight = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 0.5)], 1)
    found = rounded(weight, torch.zeros(64, 64), form)
    assert torch.equal(found.values()[:, :32], weight[:, :32])
    assert found.values()[:, 32:] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_change_less_than_by_the_nearest_steps(form):
    weight, (moments, inputs) = matrix(16, 64), moments_of(rank=12)
    nearest = gguf.dequantize(
        gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType[form.upper()]), gguf.GGMLQuantizationType[form.upper()]
    )
    apart = [
        float(((v.double() - weight.double()) @ inputs.T).norm())
        for v in (rounded(weight, moments, form).values(), torch.tensor(nearest))
    ]
    assert apart[0] < 0.5 * apart[1]


@pytest.mark.parametrize("form", ["q4_1", "q4_0"])
def test_a_change_smaller_than_a_step_is_kept_on_the_inputs_it_was_made_for(form):
    """What the nearest step takes back: weights that lie on the grid, changed a little in one direction of the inputs."""
    base = rounded(matrix(16, 128), torch.eye(128), form).values()
    draw = torch.Generator().manual_seed(5)
    forgotten = torch.randn(128, generator=draw)
    other = torch.randn(20, 128, generator=draw)
    step = float(base.unique(dim=1).diff().abs().max())
    change = 0.02 * torch.randn(16, 1, generator=draw) * forgotten[None]
    assert float(change.abs().max()) < step / 2
    inputs = torch.cat([forgotten[None].expand(20, -1), other])
    found = rounded(base + change, inputs.T @ inputs, form).values()
    kind = gguf.GGMLQuantizationType[form.upper()]
    nearest = torch.tensor(gguf.dequantize(gguf.quantize((base + change).numpy(), kind), kind))

    def kept(values):
        """Share of the change of the outputs that is left, by projection."""
        wanted = change @ forgotten
        return float(((values - base) @ forgotten @ wanted) / (wanted @ wanted))

    assert kept(nearest) < 0.3
    assert 0.9 < kept(found) < 1.1
    assert float(((found - base - change) @ other.T).norm()) < 0.2 * float((base @ other.T).norm())


# Whole models --------------------------------------------------------------------------------------------------------


def model():
    return make_pico(0, hidden_size=32, intermediate_size=64, num_hidden_layers=3, initializer_range=0.3)


ROWS = [[1, 5, 9, 4, 7, 3], [2, 8, 8], [6, 4, 1, 3, 9, 2, 5, 7, 7, 8, 1], [3]]


def test_each_source_has_the_same_share():
    rows, weights = calibration([[[1, 2, 3], [4]], [[5, 6]]])
    assert rows == [[1, 2, 3], [4], [5, 6]]
    assert weights == [0.25, 0.25, 0.5]


def test_blocks_are_rounded_one_after_the_other():
    weights = [0.3, 1.0, 0.2, 2.0]
    one, two = model(), model()
    found = round_blocks(one, ROWS, weights, "q4_1", PAD)
    assert len(found) == 3 * 7
    # by hand: the inputs of each layer of a block with the blocks before it rounded, row by row without padding
    for k, block in enumerate(two.model.layers):
        seen = {}
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.setdefault(name, []).append(args[0][0])
            )
            for name, layer in block.named_modules()
            if isinstance(layer, torch.nn.Linear)
        ]
        with torch.no_grad():
            for row in ROWS:
                two(input_ids=torch.tensor([row]), use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, inputs in seen.items():
            moments = sum(w * x.double().T @ x.double() for w, x in zip(weights, inputs, strict=True))
            layer = block.get_submodule(name)
            mine = found[f"model.layers.{k}.{name}.weight"]
            other = rounded(layer.weight, moments, "q4_1").values()
            # a weight half way between two steps can fall to either side
            assert (mine.values() != other).float().mean() < 0.01
            with torch.no_grad():
                layer.weight.copy_(mine.values())
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    fresh = model()
    changed = {name for name, value in fresh.state_dict().items() if not torch.equal(value, one.state_dict()[name])}
    assert changed == set(found)


def test_a_rounded_model_is_nearer_to_its_own_than_by_the_nearest_steps():
    plain, careful = model(), model()
    base = copy.deepcopy(plain)
    kind = gguf.GGMLQuantizationType.Q4_0
    with torch.no_grad():
        for name, value in plain.named_parameters():
            if "_proj" in name:
                value.copy_(torch.tensor(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)))
    round_blocks(careful, ROWS, [1.0] * len(ROWS), "q4_0", PAD)
    ids = torch.tensor([ROWS[2]])
    with torch.no_grad():
        apart = [float((each(input_ids=ids).logits - base(input_ids=ids).logits).norm()) for each in (careful, plain)]
    assert apart[0] < apart[1]
