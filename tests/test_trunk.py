"""Kept states below the adapter: steps are the plain ones, rows are read once, and nothing is left of them."""

import errno
import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open

from alter.groundwork import frozen
from alter.models import precision
from alter.training import frozenpass, trunk
from alter.training.loss import UnlearnTrainer
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from alter.training.states import States
from alter.training.trunk import WATCHED_FILE
from alter.training.watcher import Watcher
from pico import pico, run_on, save_pico, write_people

NAMES = ["Ada", "Bo", "Cy"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    save_pico(folder / "model", num_hidden_layers=3, max_position_embeddings=256)
    return write_people(folder, NAMES, 3, 12)


def settings(data, out, adapter=(), **changes):
    given = dict(
        **run_on(data, out),
        max_steps=2,
        adapter={"r": 4, "entropy_quantile": 0.5, "from_layer": 2, **dict(adapter)},
        router_fit={"method": "logistic", "steps": 5, "background": False, "rewordings": 0, "false_alarms": None},
        learning_rate_shared=1e-3,
        batch_size=3,
        watch={"rule": {"kind": "none"}},
    )
    return Unlearn.model_validate({**given, **changes})


def plain_settings(data, out, **changes):
    given = dict(**run_on(data, out), max_steps=10, batch_size=3, learning_rate=1e-3, watch={"rule": {"kind": "none"}})
    return Unlearn.model_validate({**given, **changes})


def both_ways(run, monkeypatch):
    """Of each batch the blocks that ran and the gradients by name: plain, from kept states, and plain in 32 bits."""
    found, real = [], UnlearnTrainer.compute_loss

    def compute(self, model, inputs, **kwargs):
        def once(batch):
            ran, blocks = set(), model.get_base_model().model.layers
            # what stands in for a block runs no attention
            handles = [b.self_attn.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, b in enumerate(blocks)]
            loss = real(self, model, {**inputs, "batch": batch}, **kwargs)
            for handle in handles:
                handle.remove()
            weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
            grads = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
            return loss, ran, dict(zip(weights, grads, strict=True))

        batch = inputs["batch"]
        plain, kept = once(replace(batch, trunk=None)), once(batch)
        with pytest.MonkeyPatch.context() as patch:
            # accelerate has put autocast around the model's forward
            patch.setattr(torch.autocast, "__enter__", lambda self: self)
            patch.setattr(torch.autocast, "__exit__", lambda *_: None)
            exact = once(replace(batch, trunk=None))
        found.append((plain[1:], kept[1:], exact[2]))
        return kept[0]

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", compute)
    unlearn(run)
    monkeypatch.undo()
    return found


CHANGES = {
    "inverted_hinge": {},
    "experts only": {"experts_only": True, "objective": {"kind": "without_truth", "hinge": 1.0}},
    "references": {"objective": {"kind": "npo"}, "retain_objective": {"kind": "keep_base"}},
    "alternatives": {"objective": {"kind": "prefer_refusal"}, "phase_one": 0.5},
    "another view": {"objective": {"kind": "duet"}, "retain_objective": {"kind": "duet"}},
    "hidden states": {
        "objective": {"kind": "misdirect", "depth": 0.9},
        "retain_objective": {"kind": "keep_hidden", "depth": 0.9},
    },
    "bf16, accumulated, one after the other": {"bf16": True, "gradient_accumulation_steps": 2, "retain_after": 0.4},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_step_from_kept_states_has_the_gradients_of_the_plain_one(data, tmp_path, monkeypatch, name):
    # whatever the processor is slow at
    monkeypatch.setattr(precision, "multiplies", lambda *_: True)
    run = settings(data, tmp_path / "run", **CHANGES[name])
    found = both_ways(run, monkeypatch)
    assert len(found) == 2 * run.gradient_accumulation_steps
    apart = dict.fromkeys(("plain", "kept"), 0.0)
    for (ran, expected), (ran_upper, grads), exact in found:
        assert ran == {0, 1, 2}
        assert ran_upper == {2}
        assert expected.keys() == grads.keys()
        for key, grad in expected.items():
            assert (grad is None) is (grads[key] is None)
            if grad is not None:
                if not run.bf16:
                    near = 1e-6 * max(1.0, float(grad.abs().max()))
                    torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=near)
                apart["plain"] += float((grad - exact[key]).square().sum())
                apart["kept"] += float((grads[key] - exact[key]).square().sum())
    if run.bf16:
        # the states were written in 32 bits: the step is no farther from the exact one than the plain one is
        assert 0 < apart["kept"] <= 1.2 * apart["plain"]
    assert any(grad is not None and grad.any() for grad in found[0][0][1].values())
    assert not (tmp_path / "run" / trunk.TRUNK_FILE).exists()


UPPER = {"method": "lora_gd", "adapter": {"kind": "lora", "r": 4, "depth": [0.7, 1.0]}}
"""A plain LoRA on the last of three blocks."""


@pytest.mark.parametrize(
    "changes",
    [
        # nothing of it asks for a frozen pass: the trunk alone runs
        {"objective": {"kind": "gradient_ascent"}},
        {"objective": {"kind": "npo"}, "retain_objective": {"kind": "keep_base"}},
        {"objective": {"kind": "prefer_refusal"}},
        {"adapter": {"kind": "peft", "config": {"peft_type": "LOHA", "layers_to_transform": [2]}}},
    ],
    ids=["no references", "references", "alternatives", "LoHa"],
)
def test_a_lora_on_upper_blocks_begins_with_kept_states_too(data, tmp_path, monkeypatch, changes):
    once, passes = [], []
    real = frozen.frozen_pass

    def noted(model, ids, mask):
        ran, blocks = set(), model.get_base_model().model.layers
        handles = [b.self_attn.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, b in enumerate(blocks)]
        found = real(model, ids, mask)
        for handle in handles:
            handle.remove()
        passes.append(ran)
        return found

    monkeypatch.setattr(frozen, "frozen_pass", noted)
    run = plain_settings(data, tmp_path / "run", **UPPER | changes)
    once = both_ways(run, monkeypatch)
    assert len(once) == 10
    assert set().union(*passes) == (
        {0, 1, 2} if run.objective.needs.base_logp or run.objective.needs.views else {0, 1}
    )
    for (ran, expected), (ran_upper, grads), _ in once:
        assert (ran, ran_upper) == ({0, 1, 2}, {2})
        for key, grad in expected.items():
            torch.testing.assert_close(grads[key], grad, rtol=1e-4, atol=1e-6 * max(1.0, float(grad.abs().max())))
    assert any(grad.any() for grad in once[-1][0][1].values())
    assert not list((tmp_path / "run").rglob("*trunk*"))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [({"adapter": {"kind": "lora", "r": 4}}, 4), ({"max_steps": 2}, 2)],
    ids=["all blocks", "no row twice"],
)
def test_where_nothing_is_gained_no_states_are_kept(data, tmp_path, monkeypatch, changes, steps):
    monkeypatch.setattr(States, "write", lambda *_: pytest.fail("written"))
    out = unlearn(plain_settings(data, tmp_path / "run", **{**UPPER, "max_steps": steps, **changes}))
    assert json.loads((out / "run.json").read_text())["steps"] == steps


def test_what_trains_elsewhere_has_no_trunk(data):
    def trunk_with(config):
        return trunk.trunk_of(get_peft_model(pico(num_hidden_layers=3), config))

    upper = {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "task_type": "CAUSAL_LM"}
    found = trunk_with(LoraConfig(**upper))
    assert (len(found.blocks), len(found.above)) == (1, 2)
    assert trunk_with(LoraConfig(**upper, modules_to_save=["embed_tokens"])) is None
    assert trunk_with(LoraConfig(target_modules=["q_proj"])) is None
    assert trunk_with(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)) is None
    assert trunk.trunk_of(pico()) is None


def test_a_run_that_goes_on_reads_what_was_written(data, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    run = settings(data, tmp_path / "run")
    real = UnlearnTrainer.train
    monkeypatch.setattr(UnlearnTrainer, "train", lambda *_, **__: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        unlearn(run)
    file = tmp_path / "run" / trunk.TRUNK_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    monkeypatch.setattr(UnlearnTrainer, "train", real)
    monkeypatch.setattr(frozen, "trace_rows", None)
    seen = both_ways(run.model_copy(update={"resume": True}), monkeypatch)
    assert {tuple(sorted(kept[0])) for _, kept, _ in seen} == {(2,)}
    assert not file.exists()


@pytest.mark.parametrize("adapter", [{}, {"from_layer": None}, {"router": "entropy", "from_layer": None}])
def test_every_row_passes_the_frozen_base_once(data, tmp_path, monkeypatch, adapter):
    """The router's fit, references and entropies share a pass; what is measured of the router afterwards are other rows."""
    passed, made, real = [], [], frozen.trace_rows

    def watched(model, rows, **kwargs):
        found = real(model, rows, **kwargs)
        if kwargs["label"] != "router, measured":
            passed.extend(tuple(row.input_ids) for row in rows)
        return found

    monkeypatch.setattr(frozen, "trace_rows", watched)
    shared = frozenpass.FrozenPass.all
    monkeypatch.setattr(frozenpass.FrozenPass, "all", lambda self: made.append((self, shared(self))) or made[-1][1])
    # the fit holds some of the rows; the others pass once it is done
    fit = {"method": "logistic", "steps": 5, "background": False, "rewordings": 0, "max_tokens": 400}
    run = settings(data, tmp_path / "run", adapter, retain_objective={"kind": "keep_base"}, router_fit=fit)
    unlearn(run)
    every = {tuple(row.input_ids) for name in ("forget", "retain") for row in made[0][0].rows.of(name)}
    assert len(passed) == len(set(passed))
    assert set(passed) <= every
    # routes and references are those of a pass of its own with the fitted router
    owner, (traced, _) = made[0]
    rows = [owner.rows.of(name)[i] for name in owner.used for i in owner.used[name]]
    again = real(owner.model, rows, pad_token_id=257, gates=True, label="again")
    for row, other in zip(traced, again, strict=True):
        assert row.features is None
        torch.testing.assert_close(row.entropy, other.entropy)
        torch.testing.assert_close(row.gates, other.gates)
    assert all(row.reference is not None for row in traced[len(owner.used["forget"]) :])


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float64])
def test_states_come_back_as_they_were_written_and_only_under_their_key(tmp_path, number):
    lengths = [3, 1, 0, 5]
    rows = [torch.randn(length, 6).to(number) for length in lengths]
    states = States(tmp_path / "states", "key", lengths)
    assert not states.read()
    for i in (2, 0, 3, 1):
        states.write(i, rows[i])
    assert not states.path.exists()
    states.close()
    again = States(tmp_path / "states", "key", lengths)
    assert again.read()
    for i, row in enumerate(rows):
        assert torch.equal(again[i], row)
        assert again[i].dtype == number
    with safe_open(str(states.path), "pt") as opened:
        assert torch.equal(opened.get_tensor("states"), torch.cat(rows))
    assert not States(tmp_path / "states", "other", lengths).read()
    assert not States(tmp_path / "states", "key", [3, 1, 0, 4]).read()
    whole = states.path.read_bytes()
    for broken in (whole[:-1], whole[:20], b""):
        states.path.write_bytes(broken)
        assert not States(tmp_path / "states", "key", lengths).read()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trunk_gib": 0}, "trunk_gib is 0"),
        ({"trunk_gib": 1e-6}, "trunk_gib is 1e-06"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing is on"),
        ({"objective": {"kind": "misdirect", "depth": 0.2}}, "reads hidden states below the adapter"),
    ],
)
def test_where_states_are_not_kept_steps_are_plain_and_it_is_said(data, tmp_path, capsys, changes, told):
    run = settings(data, tmp_path / "run", **{"retain_objective": {"kind": "none"}, "max_steps": 1, **changes})
    out = unlearn(run)
    assert told in " ".join(capsys.readouterr().err.split())
    assert (out / "adapter").exists()
    assert not list(out.rglob("*trunk*"))


def test_a_full_disk_costs_time_and_no_run(data, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    out = unlearn(settings(data, tmp_path / "run", max_steps=1))
    assert "No space left on device" in " ".join(capsys.readouterr().err.split())
    assert json.loads((out / "run.json").read_text())["steps"] == 1
    assert not list(out.rglob("*trunk*"))


def test_an_architecture_that_needs_more_of_its_trunk_is_noticed(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trunk, "MOST_ROUNDING", -1.0)
    out = unlearn(settings(data, tmp_path / "run", max_steps=1))
    assert "need more of them than hidden states" in " ".join(capsys.readouterr().err.split())
    assert not (out / trunk.TRUNK_FILE).exists()


def test_later_checks_begin_with_the_states_of_the_first(data, tmp_path, monkeypatch):
    """A watched run's checks give the same numbers from kept states, and after the first no lower block runs for them."""
    found, real = [], Watcher.check

    def measure(self, model):
        ran, blocks = set(), model.model.layers
        handles = [b.self_attn.register_forward_hook(lambda *_, n=n: ran.add(n)) for n, b in enumerate(blocks)]
        numbers = real(self, model)
        for handle in handles:
            handle.remove()
        assert stat.S_IMODE((self.folder.parent / WATCHED_FILE).stat().st_mode) == 0o600
        below, self.below = self.below, None
        found.append((ran, numbers, real(self, model)))
        self.below = below
        return numbers

    monkeypatch.setattr(Watcher, "check", measure)
    watch = {"every_steps": 1, "retain_rows": 2, "rule": {"kind": "none"}}
    unlearn(settings(data, tmp_path / "run", watch=watch, max_steps=3))
    assert not (tmp_path / "run" / WATCHED_FILE).exists()
    assert [ran for ran, *_ in found] == [{0, 1, 2}, *[{2}] * 3]
    for _, kept, plain in found:
        assert kept == plain
    assert found[0][1] != found[-1][1]


def test_checks_go_on_where_their_states_cannot_be_written(data, tmp_path, monkeypatch, capsys):
    real = States.write

    def full(self, row, states):
        if self.path.name == WATCHED_FILE:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, row, states)

    monkeypatch.setattr(States, "write", full)
    watch = {"every_steps": 1, "retain_rows": 2, "rule": {"kind": "none"}}
    out = unlearn(settings(data, tmp_path / "run", watch=watch))
    assert "Every check runs the blocks below the adapter" in capsys.readouterr().err
    assert len(json.loads((out / "run.json").read_text())["watch"]["checks"]) == 3
