"""Two processes on the CPU: gradients under DDP and FSDP2 are the mean of the single-process ones; saving works."""

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import ProcessExitedException

import children
from alter.adapter import AlterLinear
from alter.core.errors import UserError
from test_adapter import adapted, middle_threshold, rows, tiny


def make():
    model = adapted(tiny()).train()
    middle_threshold(model, rows())
    return model


def loss_of(model, rank):
    """Two forward passes, of different shapes, before one backward pass."""
    one, two = rows(seed=10 + rank), rows(batch=2, length=7, seed=20 + rank)
    return model(input_ids=one, labels=one).loss - 0.5 * model(input_ids=two, labels=two).loss


def routers(model):
    return [m.alter_router["default"] for m in model.modules() if isinstance(m, AlterLinear) and len(m.alter_router)]


def shard(model, leaves):
    for module in model.modules():
        if isinstance(module, AlterLinear) and leaves == "all":
            fully_shard(module.alter_A["default"])
            fully_shard(module.alter_B["default"])
    if leaves:
        for router in routers(model):
            fully_shard(router)
    for block in model.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(model)


CASES = [
    (wrapping, checkpointing) for wrapping in ("ddp", "blocks", "router", "all") for checkpointing in (False, True)
]


def work(rank, meeting):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for wrapping, checkpointing in CASES:
        assert_mean_gradients(rank, wrapping, checkpointing)
    # a process that leaves while the other still talks to it is aborted
    dist.barrier()
    dist.destroy_process_group()


def assert_mean_gradients(rank, wrapping, checkpointing):
    case = f"{wrapping}, checkpointing: {checkpointing}"
    expected = []
    for other in range(2):
        model = make()
        loss_of(model, other).backward()
        expected.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    keys = sorted(get_peft_model_state_dict(model))
    model = make()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = model
    if wrapping == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif wrapping == "blocks":
        shard(model, "")
        for router in routers(model):
            router.requires_grad_(False)
        expected = [{n: g for n, g in grads.items() if "router" not in n} for grads in expected]
    else:
        shard(model, wrapping)
    loss_of(wrapped, rank).backward()
    parameters = dict(model.named_parameters())
    for name in expected[0]:
        grad = parameters[name].grad
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        torch.testing.assert_close(grad, (expected[0][name] + expected[1][name]) / 2, msg=f"{case}, {name}")
    if wrapping != "ddp":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(model, options=options)
        assert rank != 0 or sorted(get_peft_model_state_dict(model, state_dict=state)) == keys, case


def refuse(rank, meeting):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=1)
    model = make()
    shard(model, "")
    with pytest.raises(UserError, match="trains inside an FSDP unit"):
        loss_of(model, rank)
    dist.destroy_process_group()


def together(function, folder, processes):
    """Run the processes; once more if they lost each other (a crash or a wait), never if one of them raised."""
    for attempt in range(3):
        context = children.ranks(function, str(folder / f"meeting{attempt}"), processes=processes)
        until = time.monotonic() + 90
        try:
            while time.monotonic() < until:
                if context.join(timeout=1):
                    return
        except ProcessExitedException:
            continue
        for process in context.processes:
            process.kill()
    raise AssertionError("the processes never came to an end")


@pytest.mark.slow
def test_gradients_of_two_processes(tmp_path):
    together(work, tmp_path, 2)


@pytest.mark.slow
def test_a_router_that_trains_inside_an_fsdp_unit_is_refused(tmp_path):
    """One process: an error inside a unit leaves two processes waiting for each other."""
    together(refuse, tmp_path, 1)
