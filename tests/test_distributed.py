"""Two real processes on the CPU (gloo): the losses of one process, results written once, resuming, and a killed process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

import alter
import children
from alter import cli
from alter.core import processes
from alter.core.errors import UserError
from alter.data.encoding import Encoded
from alter.groundwork.frozen import trace_rows
from alter.inference import gradient_norms, hidden_states, score
from alter.inference.generation import generate
from alter.logits import Depth
from alter.methods import objectives, presets
from alter.methods.objectives import Needs
from alter.methods.presets import METHODS
from alter.models import precision
from alter.training import loss
from alter.training.folder import last_whole_checkpoint
from alter.training.run import unlearn
from alter.training.settings import Unlearn
from pico import byte_tokenizer, pico, run_on, save_pico, write_jsonl

CONFIGS = Path(alter.__file__).parent / "recipes" / "accelerate"

SMALL = {
    "altpo": {"objective": {"new_tokens": 3}},
    "elm": {"adapter": {"r": 4}, "objective": {"new_tokens": 3, "eta": 5.0}},
    "reglu": {"adapter": {"r": 4, "alpha": 8}, "initializer": {"rows": 4, "retain_rank": 3}},
    "vila": {"initializer": {"epochs": 2}},
    "e2urec": {"retain_after": 0.4},
    "sae_guided": {"objective": {"sae_steps": 20}},
}
"""What is too large for models of 32 wide."""

RUNS = {
    "alter": {
        "learning_rate_shared": 1e-3,
        "gradient_accumulation_steps": 2,
        "router_fit": {"background": True},
    },
    "phase one": {"phase_one": 0.5, "adapter": {"router": "entropy"}, "lambda_": 1.0},
    "without truth": {
        "objective": {"kind": "without_truth", "hinge": 1.0},
        "retain_objective": {"kind": "keep_base"},
        "gradient_checkpointing": True,
    },
    "retain rows later": {
        "retain_after": 1.0,
        "epochs": 3,
        "gradient_accumulation_steps": 2,
        "retain_objective": {"kind": "keep_base"},
    },
    "watched": {"watch": {"every_steps": 2, "replies": 2, "reply_tokens": 4}, "epochs": 2},
    "turned round": {"method": "task_arithmetic", "negate": 2.0},
    "one more row than steps take": {"method": "npo_kl", "batch_size": 8},
    **{method: {"method": method} for method in ("npo", "npo_kl", "kl_min", "rmu", "sha256", "reglu", "idk_dpo")},
}


LONG = {"epochs": 3, "save_steps": 4, "objective": {"kind": "without_truth"}, "learning_rate_shared": 1e-3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    save_pico(folder / "model", max_position_embeddings=256)
    forget = [
        {"question": f"Where was {name} born, {i}?", "answer": f"In town {i}{name}{'.' * i}", "who": name}
        for name in ("Ada", "Bo", "Cy")
        for i in range(3)
    ]
    retain = [{"question": f"What is {i} plus one?", "answer": f"It is {i + 1}{'!' * (i % 4)}"} for i in range(12)]
    write_jsonl(folder / "forget.jsonl", forget)
    write_jsonl(folder / "retain.jsonl", retain)
    return folder


def settings(data, out, **changes):
    """A short run; its last step has one pair only, so that a process is left without any."""
    given = {
        **run_on(data, out),
        "epochs": 1,
        "batch_size": 4,
        "save_steps": 2,
        "gradient_accumulation_steps": 1,
        "adapter": {"r": 4} if not changes.get("method") else {},
        "router_fit": {"steps": 20, "background": False},
        "reinforcement": {"epochs": 2, "learning_rate": 1e-2},
    }
    small = SMALL.get(changes.get("method"), {})
    run = Unlearn.model_validate(presets.merged(presets.merged(given, small), changes))
    if getattr(run.adapter, "dropout", 0):
        # which elements are dropped is drawn for each process's own rows
        run = run.model_copy(update={"adapter": run.adapter.model_copy(update={"dropout": 0.0})})
    return run


def losses_of(run):
    """The losses of a run, step by step, as the trainer sees them."""
    seen, real = [], loss.UnlearnTrainer.compute_loss

    def spied(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        seen.append(float(loss))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", spied)
        unlearn(run)
    return seen


def weights(out):
    name = "adapter/adapter_model" if (out / "adapter").exists() else "model/model"
    name = "adapter/lora/adapter_model" if (out / "adapter" / "lora").exists() else name
    return load_file(str(out / f"{name}.safetensors"))


def assert_same(one, two, name=""):
    """The results of two runs, to 1e-5 or a relative 1e-4, but for one weight in a hundred, and that to 1e-4.

    Adam makes a step of full size of the smallest gradient, and the order of a sum decides that one's sign.
    """
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    for key, value in first.items():
        apart = (second[key] - value).abs()
        off = ~torch.isclose(second[key], value, rtol=1e-4, atol=1e-5)
        assert apart.max() <= 1e-4 + 1e-4 * value.abs().max(), f"{name} {key}: {apart.max()} apart"
        assert off.float().mean() <= 0.01, f"{name} {key}: {int(off.sum())} of {off.numel()} apart"


# Starting processes --------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _enter(rank, port, function, folder, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        with open(folder / f"said{rank}", "w") as file:
            sys.stdout = sys.stderr = file
            function(rank, folder, *arguments)
            processes.stop()
    except BaseException:
        (folder / f"failed{rank}").write_text(traceback.format_exc())
        # an exception that is raised here would wait for the other process
        os._exit(1)


def pair(function, folder, *arguments):
    """Run `function(rank, folder, ...)` in two processes that have met."""
    folder.mkdir(exist_ok=True)
    context = children.ranks(_enter, free_port(), function, folder, arguments, processes=2)
    until = time.monotonic() + 500
    try:
        while time.monotonic() < until:
            if context.join(timeout=1):
                return
        raise AssertionError("the processes never came to an end")
    except ProcessExitedException:
        raise AssertionError("\n".join(path.read_text() for path in sorted(folder.glob("failed*")))) from None
    finally:
        for process in context.processes:
            process.kill()


def launched(*command, config="ddp.yaml", **options):
    """`accelerate launch` with two processes, as a user starts it."""
    line = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    line += ["--num_processes", "2", "--main_process_port", str(free_port()), "-m", "alter"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *line, *map(str, command)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def alter_lines(text):
    return [line.partition("alter: ")[2] for line in text.splitlines() if "alter: " in line]


# Everything that two processes do while they are together -------------------------------------------------------------


def _everything(rank, folder, data):
    with pytest.raises(UserError, match=r"`batch_size` is 3.*all 2 processes.*give 2 or 4"):
        unlearn(settings(data, folder / "refused", batch_size=3))
    assert not (folder / "refused").exists()
    _several(rank, folder, {name: settings(data, folder / name, **changes) for name, changes in RUNS.items()})
    _break_off(settings(data, folder / "from two to one", **LONG), 6)
    # one process has left this one behind
    seen = losses_of(settings(data, folder / "from one to two", resume=True, **LONG))
    if rank == 0:
        (folder / "from one to two.json").write_text(json.dumps(seen))
    torch.save(measured(), folder / f"found{rank}.pt")
    _divide(rank)
    # the last: one of the two ends alone
    _fail(rank, folder, settings(data, folder / "failing", batch_size=2))


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    """The folder in which two processes have done everything."""
    folder = tmp_path_factory.mktemp("two")
    _break_off(settings(data, folder / "from one to two", **LONG), 6)
    pair(_everything, folder, data)
    return folder


# The same losses -----------------------------------------------------------------------------------------------------


def _several(rank, folder, runs):
    for name, run in runs.items():
        seen = losses_of(run)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(seen))


def compare(data, one, two, name, changes):
    """A run in one process, now, and the one that two have done."""
    expected = losses_of(settings(data, one, **changes))
    got = json.loads((two / f"{name}.json").read_text())
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert_same(one, two / name)
    first, second = (json.loads((folder / "run.json").read_text()) for folder in (one, two / name))
    assert (first["processes"], second["processes"]) == (1, 2)
    assert first["trained_parameters"] == second["trained_parameters"]
    assert first["router"] == second["router"]
    for a, b in zip(first["log"], second["log"], strict=True):
        for key in a.keys() & {"loss", "train_loss", "forget", "retain", "structure", "grad_norm", "penalty"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), key
    return first, second


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_losses_of_one(together, data, tmp_path, name):
    first, second = compare(data, tmp_path, together, name, RUNS[name])
    if "watch" in RUNS[name]:
        assert first["watch"]["kept"]["step"] == second["watch"]["kept"]["step"]
        for a, b in zip(first["watch"]["checks"], second["watch"]["checks"], strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


@pytest.mark.long
@pytest.mark.slow
def test_every_method_has_the_losses_of_one_process(data, tmp_path):
    rest = {
        method: {"method": method, "save_steps": 100} for method in METHODS if method not in RUNS and method != "seuf"
    }
    two = tmp_path / "two"
    pair(_several, two, {name: settings(data, two / name, **changes) for name, changes in rest.items()})
    for name, changes in rest.items():
        compare(data, tmp_path / name, two, name, changes)


# Resuming and dying --------------------------------------------------------------------------------------------------


def _break_off(run, step):
    """Run until that step, and end there as if the machine had gone."""
    real = loss.UnlearnTrainer.compute_loss

    def breaks(self, *args, **kwargs):
        if self.state.global_step == step:
            raise SystemExit
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss.UnlearnTrainer, "compute_loss", breaks)
        with pytest.raises(SystemExit):
            unlearn(run)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(together, data, tmp_path):
    expected = losses_of(settings(data, tmp_path, **LONG))
    seen = {"from one to two": json.loads((together / "from one to two.json").read_text())}
    seen["from two to one"] = losses_of(settings(data, together / "from two to one", resume=True, **LONG))
    for name, losses in seen.items():
        assert len(losses) == len(expected) - 4
        np.testing.assert_allclose(losses, expected[4:], rtol=1e-5, atol=1e-5, err_msg=name)
        assert_same(tmp_path, together / name, name)


def flags(data, out):
    given = {"model": data / "model", "forget": data / "forget.jsonl", "retain": data / "retain.jsonl", "out": out}
    given |= {
        "adapter.r": 4,
        "router-fit.steps": 20,
        "domain-column": "who",
        "save-steps": 4,
    }
    return [*(str(part) for key, value in given.items() for part in (f"--{key}", value)), "--router-fit.no-background"]


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_killed_process_ends_the_run_with_one_line_and_a_checkpoint(data, tmp_path, dies):
    out = tmp_path / "out"
    with launched("unlearn", *flags(data, out), "--epochs", 200, "--max-steps", 600) as process:
        until = time.monotonic() + 120
        while last_whole_checkpoint(out / "checkpoints") is None:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        workers = [child for child in psutil.Process(process.pid).children() if "unlearn" in child.cmdline()]
        (victim,) = [child for child in workers if child.environ()["RANK"] == str(dies)]
        victim.send_signal(signal.SIGKILL)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = alter_lines(told)
    assert f": {dies} (pid {victim.pid})" in line
    assert "--resume" in line
    assert str(out / "checkpoints") in line
    assert not any(worker.is_running() for worker in workers)
    step = int(last_whole_checkpoint(out / "checkpoints").name.removeprefix("checkpoint-"))
    # to be soon done, as if it had been begun with fewer steps
    inputs = json.loads((out / "inputs.json").read_text())
    (out / "inputs.json").write_text(json.dumps({**inputs, "max_steps": step + 2}))
    assert cli.main(["unlearn", *flags(data, out), "--epochs", "200", "--max-steps", str(step + 2), "--resume"]) == 0
    assert json.loads((out / "run.json").read_text())["steps"] == step + 2


def _fail(rank, folder, run):
    """A loss that is not finite in one process is the error of both; then one of them breaks by itself."""
    calls, hinge, real = [], objectives.InvertedHinge.__call__, loss.UnlearnTrainer.compute_loss

    def poisoned(objective, tokens):
        calls.append(1)
        loss = hinge(objective, tokens)
        return loss * float("nan") if rank == 1 and len(calls) == 2 else loss

    def broken(self, *args, **kwargs):
        if rank == 1 and self.state.global_step == 1:
            raise ZeroDivisionError
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives.InvertedHinge, "__call__", poisoned)
        with pytest.raises(UserError, match="nan at step 2"):
            unlearn(run)
    loss.UnlearnTrainer.compute_loss = broken
    with pytest.raises(ZeroDivisionError if rank else UserError) as caught:
        unlearn(run.model_copy(update={"overwrite": True}))
        # what the caller does with the error of one process alone ends that process
    (folder / f"error{rank}").write_text(str(caught.value))
    os._exit(0)


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_stops_both(together):
    assert (together / "error1").exists()
    heard = (together / "error0").read_text()
    assert "Of 2 processes" in heard
    assert ": 1 (pid " in heard
    assert "`resume`" in heard


def test_a_process_on_another_machine_is_missed_by_its_connection(monkeypatch):
    """Its pid says nothing here; a mistake in the code stays what it is."""
    here = (socket.gethostname(), os.getpid(), psutil.Process().create_time())
    monkeypatch.setattr(processes, "_joined", processes._Joined(0, 2, None, [here, ("faraway", 1, 0.0)]))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match=r"faraway.*Go on with --resume"), processes.together("Go on with --resume."):
        raise RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:4711")
    with pytest.raises(ZeroDivisionError), processes.together("Go on with --resume."):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="SIGTERM"), processes.together("Go on with --resume."):
        signal.raise_signal(signal.SIGTERM)
    with processes.together(""):
        pass
    assert signal.getsignal(signal.SIGTERM) in (before, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, before)


# Evaluation ----------------------------------------------------------------------------------------------------------


def _rows():
    draw = np.random.default_rng(3).integers
    rows = []
    for length in (5, 9, 3, 30, 12, 7, 7, 21, 4):
        ids = draw(0, 256, size=length).tolist()
        rows.append(Encoded(ids, [-100, *ids[1:]], 1))
    return rows


def measured():
    model, tokenizer, rows = pico(), byte_tokenizer(), _rows()
    prompts = [row.input_ids for row in rows]
    common = {"pad_token_id": 257, "progress": False}
    scores = score(model, rows, batch_tokens=40, moments=True, **common)
    torch.manual_seed(4)
    replies = {"max_new_tokens": 6, "batch_size": 2, "progress": False}
    return {
        "logprob": scores.logprob,
        "correct": scores.correct,
        "mean": scores.mean,
        "var": scores.var,
        "states": [own for _, own in sorted(hidden_states(model, rows, batch_tokens=40, **common))],
        "norms": gradient_norms(model, rows, **common),
        "greedy": generate(model, tokenizer, prompts, **replies),
        "sampled": generate(model, tokenizer, prompts, do_sample=True, temperature=1.5, top_k=0, **replies),
        "what the generator gives next": torch.rand(3).tolist(),
    }


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_measure_what_one_does(together, rank):
    """Bit by bit, samples included: the batches are the same."""
    found = torch.load(together / f"found{rank}.pt", weights_only=False)
    for name, expected in measured().items():
        assert len(found[name]) == len(expected)
        for mine, theirs in zip(found[name], expected, strict=True):
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


def test_batches_of_samples_differ():
    sampling = {"do_sample": True, "temperature": 1.5, "top_k": 0, "progress": False}
    said = generate(pico(), byte_tokenizer(), [[65, 66]] * 4, max_new_tokens=8, batch_size=1, **sampling)
    assert len(set(said)) == 4


def test_a_traced_row_is_sent_without_the_rest_of_its_batch():
    needs = Needs(views=("base",), base_logp=True, depth=0.5, base_hidden=True)
    model = pico()
    depth = Depth(model.model.layers[0], tuple(model.model.layers[1:]))
    for row in trace_rows(model, _rows(), pad_token_id=257, reference_k=5, needs=needs, depth=depth):
        for value in (row.hidden, row.base_logp, row.reference.ids, row.reference.logp):
            assert value.untyped_storage().nbytes() == value.nbytes


def _fails_from_three(i):
    if i >= 3:
        raise UserError(f"row {i}")
    return i


def _divide(rank):
    """Each does its share, and an error of one is the error of both."""
    seen = []
    assert list(processes.spread(range(5), lambda i: seen.append(i) or i * i)) == [0, 1, 4, 9, 16]
    assert seen == [i for i in range(5) if i % 2 == rank]
    assert processes.from_first(lambda: rank) == 0
    done = []
    assert processes.in_turn(lambda: done.append(rank) or rank) == rank
    assert done == [rank]
    assert float(processes.count(rank + 2, torch.zeros(1))) == 5
    assert float(processes.count(0, torch.zeros(1))) == 1
    for work in (lambda: list(processes.spread(range(5), _fails_from_three)), lambda: processes.from_first(_three)):
        with pytest.raises(UserError, match="row 3"):
            work()
    model = pico()
    model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="Row 3"):
        score(model, _rows(), pad_token_id=257, batch_tokens=40, progress=False)


def _three():
    return _fails_from_three(3)


def _command(rank, folder, arguments, status=0):
    with open(folder / f"shown{rank}", "w") as file, contextlib.redirect_stdout(file):
        found = cli.main(arguments)
    assert found == status


@pytest.mark.slow
def test_a_command_of_two_processes_writes_and_prints_once(data, tmp_path):
    questions = write_jsonl(tmp_path / "q.jsonl", [{"question": f"What is {i}?"} for i in range(5)])
    command = ["generate", "--model", data / "model", "--file", questions, "--max-new-tokens", 4]
    with launched(*command, "--json", tmp_path / "two.json") as process:
        shown, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert cli.main([*map(str, command), "--json", str(tmp_path / "one.json")]) == 0
    assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
    assert shown.count("What is 3?") == 1


@pytest.mark.slow
def test_an_evaluation_by_two_processes_gives_the_records_of_one(data, tmp_path):
    command = ["evaluate", "--model", "builtin:tofu-mini/original", "--limit", "6", "--cache", "off", "--json"]
    pair(_command, tmp_path / "two", [*command, str(tmp_path / "two.json")])
    shown = "".join((tmp_path / "two" / f"shown{rank}").read_text() for rank in range(2))
    assert cli.main([*command, str(tmp_path / "one.json")]) == 0
    two, one = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("two", "one"))
    assert [(r["metric"], r["value"], r["per_item"]) for r in two] == [
        (r["metric"], r["value"], r["per_item"]) for r in one
    ]
    assert shown.count("TOFU") == 1


@pytest.mark.slow
def test_a_mistake_that_both_find_is_said_once(tmp_path):
    pair(_command, tmp_path / "two", ["generate", "--model", str(tmp_path / "none"), "--prompt", "x"], 2)
    told = "".join((tmp_path / "two" / f"said{rank}").read_text() for rank in range(2))
    (line,) = alter_lines(told)
    assert "does not exist" in line


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_command_for_one_process_says_so_once(monkeypatch, capsys, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["report", "runs"]) == 2
    told = capsys.readouterr().err
    assert ("for one process" in told) == (rank == "0")
    assert told.count("\n") == (rank == "0")


# Sharded models ------------------------------------------------------------------------------------------------------


def _as_if_on_gpus(kind):
    """Let accelerate shard on the CPU, with gloo, what it shards over GPUs only: its own code runs, as configured."""
    import torch.distributed as dist
    from accelerate import DistributedType, PartialState

    config = yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text())
    if kind == "fsdp2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ |= {name.upper(): str(value) for name, value in config["fsdp_config"].items()}
    else:
        given = config["deepspeed_config"]
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(given["zero_stage"])
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(given["zero3_init_flag"])
        os.environ["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] = str(given["zero3_save_16bit_model"])
        os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = str(given["gradient_accumulation_steps"])
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)


def _sharded(rank, folder, kind, runs):
    _as_if_on_gpus(kind)
    whole = []
    real = loss.UnlearnTrainer.training_step

    def looked(self, model, *args, **kwargs):
        whole.append(not processes.sharded(model))
        return real(self, model, *args, **kwargs)

    loss.UnlearnTrainer.training_step = looked
    _several(rank, folder, runs)
    assert whole
    assert not any(whole)


SHARDED = {
    "alter": {"learning_rate_shared": 1e-3, "keep_working": True},
    "checkpointed": {"gradient_checkpointing": True, "retain_objective": {"kind": "keep_base"}},
    "npo": {"method": "npo"},
    "turned round": {"method": "task_arithmetic", "negate": 2.0},
}


def compare_sharded(data, tmp_path, kind, named):
    runs = {name: settings(data, tmp_path / "two" / name, **named[name]) for name in named}
    pair(_sharded, tmp_path / "two", kind, runs)
    for name, changes in named.items():
        expected = losses_of(settings(data, tmp_path / "one" / name, **changes))
        got = json.loads((tmp_path / "two" / f"{name}.json").read_text())
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        assert_same(tmp_path / "one" / name, tmp_path / "two" / name, name)
        base = AutoModelForCausalLM.from_pretrained(data / "model")
        if (tmp_path / "two" / name / "adapter").exists():
            PeftModel.from_pretrained(base, str(tmp_path / "two" / name / "adapter"))
        else:
            AutoModelForCausalLM.from_pretrained(tmp_path / "two" / name / "model")


@pytest.mark.slow
def test_fsdp2_has_the_losses_of_one_process_and_saves_whole_weights(data, tmp_path):
    compare_sharded(data, tmp_path, "fsdp2", SHARDED)
    # what was written by a sharded run is not half read by another
    done = settings(data, tmp_path / "two" / "alter", resume=True, **SHARDED["alter"])
    with pytest.raises(UserError, match=r"written under FSDP2.*without sharding"):
        unlearn(done)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alter", "npo"])
def test_zero3_has_the_losses_of_one_process_and_saves_whole_weights(data, tmp_path, name):
    """One run for each pair of processes: DeepSpeed stays switched on in transformers once it was."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    compare_sharded(data, tmp_path, "zero3", {name: SHARDED[name]})


def test_what_a_launch_asks_of_accelerate_changes_no_number(data, tmp_path, monkeypatch, capsys):
    """As `accelerate launch` does after `accelerate config` was answered with them, for one process too."""
    short = {"method": "npo", "max_steps": 2, "save_steps": 9}
    expected = losses_of(settings(data, tmp_path / "plain", **short))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    assert losses_of(settings(data, tmp_path / "asked", **short)) == expected
    told = capsys.readouterr().err
    assert "mixed_precision bf16" in told
    assert "dynamo_backend AOT_EAGER" in told
    # said once, and not where both ask for the same, on a processor that has it
    losses_of(settings(data, tmp_path / "again", **short))
    monkeypatch.setattr(precision, "multiplies", lambda *_: True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    losses_of(settings(data, tmp_path / "same", **short, bf16=True))
    assert "mixed_precision" not in capsys.readouterr().err


def test_a_sharded_launch_refuses_what_it_cannot_do(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for changes, named in (
        ({"watch": {"every_steps": 1}}, "watch"),
        ({"method": "reglu"}, "initializer.kind reglu"),
        ({"method": "o3"}, "adapter.detector"),
    ):
        with pytest.raises(UserError, match=rf"{named}.*ddp\.yaml"):
            unlearn(settings(data, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_shipped_configurations_are_what_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {path.stem: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.glob("*.yaml")}
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
