"""The benchmark: every contestant is what it says, at toy size; speeds are not tested."""
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from commands import one_line
from torch.testing import assert_close

from tinyanl.experiments import benchmark as module
from tinyanl.experiments.benchmark import (
    PEERS,
    Shape,
    benchmark,
    diffusers_sampler,
    diffusers_trainer,
    main,
    our_trainer,
    training,
)

CPU = torch.device("cpu")
SMALL = Shape(8, 32, (1, 2), 1, (False, True), 64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(module.SHAPES, "embedded", SMALL)


def test_diffusers_has_the_same_unet_and_trains_the_same_part():
    cond = torch.randn(2, 64)
    z = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 900])
    for tune in ("attention", "all"):
        ours = our_trainer(SMALL, tune, CPU)
        peer = diffusers_trainer(SMALL, tune, CPU)
        assert ours.bind(cond)(z, t).shape == peer.bind(cond)(z, t).shape == z.shape
        # over one token, queries, keys and their norm do nothing; we leave them out: 4 blocks,
        # 64 wide
        dead = 4 * (2 * 64 * 64 + 2 * 64)
        our_numbers = sum(p.numel() for p in ours.parameters)
        assert our_numbers + dead == sum(p.numel() for p in peer.parameters)


def test_the_fairest_sampler_of_diffusers_is_the_plain_one_in_another_layout(monkeypatch):
    """And, where the device computes in bf16, with all of its numbers in bf16, but for rounding."""
    cond = torch.randn(2, 64)
    z = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 900])
    eps = {}
    for bf16 in (False, True):
        monkeypatch.setattr(module, "has_bf16", lambda device, bf16=bf16: bf16)
        for channels_last in (False, True):
            torch.manual_seed(0)
            sampler = diffusers_sampler(SMALL, channels_last, CPU)
            assert not sampler.parameters
            with torch.no_grad():
                eps[bf16, channels_last] = sampler.bind(cond)(z, t)
    assert all(x.dtype == torch.float32 for x in eps.values())
    assert_close(eps[False, True], eps[False, False], rtol=1e-3, atol=1e-3)
    assert not torch.equal(eps[True, True], eps[False, True])
    for channels_last in (False, True):
        error = (eps[True, channels_last] - eps[False, False]).square().mean()
        assert error < 0.01 * eps[False, False].square().mean()


def test_every_contestant_runs_and_is_compared(capsys):
    found = benchmark(batch=2, rounds=1, device="cpu", vs_diffusers=True)
    rows = {row["what"]: row for row in found}
    assert set(rows) == {
        "train anl",
        "train attention",
        "train all",
        "sample anl",
        "sample",
        "diffusers train attention",
        "diffusers train all",
        "diffusers sample",
        "diffusers sample, channels last",
    }
    assert all(row["images/s"] > 0 for row in rows.values())
    for name, peers in PEERS.items():
        best = max(rows[peer]["images/s"] for peer in peers)
        assert rows[name]["ratio"] == rows[name]["images/s"] / best
    assert "embedded, batch 2, cpu" in capsys.readouterr().out


def test_images_a_second_are_the_batch_over_the_median(monkeypatch):
    def half_a_second(step, device):
        step()
        return 0.5

    monkeypatch.setattr(module, "seconds", half_a_second)
    rows = {row["what"]: row for row in benchmark(batch=2, rounds=1, device="cpu")}
    assert rows["train anl"]["images/s"] == 4
    assert rows["sample"]["images/s"] == pytest.approx(4 * 2 / 50)
    assert all("ratio" not in row for row in rows.values())


def test_a_sample_is_as_many_evaluations_as_are_timed():
    times = []

    def bind(cond):
        def model(z, t):
            times.append(t.tolist())
            return torch.zeros_like(z)

        return model

    contestant = module.Contestant(bind, [])
    module.sampling(contestant, torch.zeros(2, 3, 8, 8), torch.zeros(2, 64), steps=2)()
    assert times == [[981, 981], [961, 961]]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="torch.compile makes C++ for a CPU: it needs g++ and Python's headers",
)
def test_a_compiled_training_step_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda device: False)
    found = {}
    for compile in (False, True):
        torch.manual_seed(0)
        contestant = our_trainer(SMALL, "anl", CPU)
        for p in contestant.parameters:
            torch.nn.init.normal_(p, std=0.1)  # not the identity, which has few gradients
        training(contestant, torch.randn(2, 3, 8, 8), torch.randn(2, 64), compile)()
        found[compile] = [p.grad for p in contestant.parameters]
    assert_close(found[True], found[False])


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--batch", "0"], "--batch 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--shape", "none"], "--shape"),
        (["--device", "none"], "none"),
    ],
)
def test_a_mistake_is_one_line(argv, said, capsys):
    assert said in one_line(main, argv, capsys)
