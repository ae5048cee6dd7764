"""The benchmark: every contestant is what it says, at toy size; speeds are not tested."""
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tinyanl.experiments import benchmark as module
from tinyanl.experiments.benchmark import benchmark, main, ours, theirs, training

from commands import one_line

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(module.SHAPES, "embedded", (8, (32, (1, 2), 1, (False, True), 64)))


def test_diffusers_has_the_same_unet_and_trains_the_same_part():
    cond, z, t = torch.randn(2, 64), torch.randn(2, 3, 8, 8), torch.tensor([3, 900])
    for tune in ("attention", "all"):
        (bind, own), (peer_bind, peer) = ours("embedded", tune, CPU), theirs("embedded", tune, CPU)
        assert bind(cond)(z, t).shape == peer_bind(cond)(z, t).shape == z.shape
        # over one token, queries, keys and their norm do nothing; we leave them out: 4 blocks, 64 wide
        dead = 4 * (2 * 64 * 64 + 2 * 64)
        assert sum(p.numel() for p in own) + dead == sum(p.numel() for p in peer)


def test_every_contestant_runs_and_is_compared(capsys):
    rows = {row["what"]: row for row in benchmark(batch=2, rounds=1, device="cpu", vs_diffusers=True)}
    assert set(rows) == {"train anl", "train attention", "train all", "sample anl", "sample",
                         "diffusers train attention", "diffusers train all", "diffusers sample"}
    assert all(row["images/s"] > 0 and row["of the limit"] > 0 for row in rows.values())
    for name, peer in (("train anl", "train attention"), ("train all", "train all"), ("sample anl", "sample")):
        assert rows[name]["ratio"] == rows[name]["images/s"] / rows[f"diffusers {peer}"]["images/s"]
    assert "embedded, batch 2, cpu" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") and Path(sysconfig.get_path("include"), "Python.h").exists()),
                    reason="torch.compile makes C++ for a CPU: it needs g++ and Python's headers")
def test_a_compiled_training_step_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(module, "has_bf16", lambda device: False)
    found = {}
    for compile in (False, True):
        torch.manual_seed(0)
        contestant = ours("embedded", "anl", CPU)
        for p in contestant[1]:
            torch.nn.init.normal_(p, std=0.1)  # not the identity, which has few gradients
        training(contestant, torch.randn(2, 3, 8, 8), torch.randn(2, 64), compile)()
        found[compile] = [p.grad for p in contestant[1]]
    assert_close(found[True], found[False])


def test_a_mistake_is_one_line(capsys):
    for argv in (["--batch", "0"], ["--shape", "none"], ["--device", "none"]):
        one_line(main, argv, capsys)
