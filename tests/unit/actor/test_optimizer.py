"""The learning rate of every optimizer update, against the formula."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from rounding import approx, assert_close
from tiny_models import actor_config

from megatron_prepo.actor import checkpoint, optimizer
from megatron_prepo.actor.optimizer import build_optimizer, build_schedule, fuse_adam

PEAK, LEAST = 3e-4, 1e-5


def rates(**settings) -> list[float]:
    """Return the learning rates of all updates of a run."""
    train = {name: settings.pop(name) for name in ("total_steps", "mini_batches")}
    config = actor_config("unused", optimizer={"lr": PEAK, "min_lr": LEAST} | settings, train=train)
    optimizer, used = SimpleNamespace(param_groups=[{}]), []
    schedule = build_schedule(config.optimizer, config.train, optimizer)
    for _ in range(train["total_steps"] * train["mini_batches"]):
        used.append(optimizer.param_groups[0]["lr"])
        schedule.step(increment=1)
    return used


def expected(update: int, warmup: int, total: int, style: str) -> float:
    """Return the rate: linear to the peak in W updates; then the decay, which would end after the
    last update."""
    if update < warmup:
        return PEAK * (update + 1) / warmup
    peak_at = max(0, warmup - 1)
    share = (update - peak_at) / (total - peak_at)
    left = {"constant": 1, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
    return PEAK if style == "constant" else LEAST + left[style] * (PEAK - LEAST)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("mini_batches", [1, 2])
def test_every_update_of_every_length_of_warm_up(style, mini_batches):
    """Float64 is compared with float64: a few roundings apart."""
    for total in range(1, 6):
        for warmup in range(total + 1):
            used = rates(
                lr_warmup_steps=warmup,
                total_steps=total,
                mini_batches=mini_batches,
                lr_decay_style=style,
            )
            sizes = warmup * mini_batches, total * mini_batches
            by_hand = [expected(u, *sizes, style) for u in range(len(used))]
            assert used == approx(by_hand)
            assert min(used) > 0 and max(used) == approx(PEAK)


def adam(fused: bool, state: dict | None = None):
    """Return a parameter and its Adam, as `build_optimizer` makes it; with a loaded state."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    torchs = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)
    megatrons = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=torchs)])
    fuse_adam(megatrons, fused=fused)
    if state is not None:
        torchs.load_state_dict(copy.deepcopy(state))  # as from a file
        fuse_adam(megatrons, fused=fused)
    return parameter, torchs


def adams(parameter):
    """Return Megatron's optimizer around a new Adam, as far as it is built and loaded."""
    torchs = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1)

    def load_state_dict(state):
        del state["optimizer"]["state"]["common_step"]  # Megatron takes it out, too
        torchs.load_state_dict(state["optimizer"])

    parts = [SimpleNamespace(optimizer=torchs)]
    groups = torchs.param_groups
    return SimpleNamespace(
        chained_optimizers=parts, load_state_dict=load_state_dict, param_groups=groups
    )


def update(parameter, torchs) -> None:
    parameter.grad = parameter.detach() + 0.5
    torchs.step()


def forms(torchs) -> set:
    return {group["fused"] for group in torchs.param_groups}


def test_one_kernel_updates_as_many_do():
    plain, fused = adam(fused=False), adam(fused=True)
    for _ in range(3):
        update(*plain)
        update(*fused)
    assert (forms(plain[1]), forms(fused[1])) == ({None}, {True})
    assert_close(fused[0].detach(), plain[0].detach(), scale=1.0)
    assert not torch.equal(fused[0], torch.linspace(-1, 1, 7))


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_a_loaded_state_takes_the_form_of_the_device_that_reads_it(wrote, reads):
    """Otherwise a run would keep the form of the machine that wrote its checkpoint."""
    writer = adam(fused=wrote)
    update(*writer)
    reader = adam(fused=reads, state=writer[1].state_dict())
    with torch.no_grad():
        reader[0].copy_(writer[0])
    assert forms(reader[1]) == {reads or None}
    update(*writer)
    update(*reader)
    assert_close(reader[0].detach(), writer[0].detach(), scale=1.0)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_built_optimizer_has_the_form_of_its_device(monkeypatch, on_gpu):
    megatrons = adams(torch.nn.Parameter(torch.ones(3)))
    monkeypatch.setattr(optimizer, "get_megatron_optimizer", lambda *_: megatrons)
    config = actor_config("unused")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    settings = (config.optimizer, config.train, config.megatron)
    built, _ = build_optimizer(*settings, [], dtype="float32")
    assert built is megatrons
    assert forms(built.chained_optimizers[0].optimizer) == {on_gpu or None}


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_resumed_optimizer_has_the_form_of_its_device(monkeypatch, wrote, on_gpu):
    writer = adam(fused=wrote)
    update(*writer)
    megatrons = adams(torch.nn.Parameter(writer[0].detach().clone()))
    state = copy.deepcopy(writer[1].state_dict())
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: on_gpu)
        checkpoint._load_optimizer(megatrons, {"optimizer": state})
    reader = megatrons.chained_optimizers[0].optimizer
    assert forms(reader) == {on_gpu or None}
    [parameter] = reader.param_groups[0]["params"]
    update(*writer)
    update(parameter, reader)
    assert_close(parameter.detach(), writer[0].detach(), scale=1.0)
