"""The benchmark: every contestant is what it says, at toy size; speeds are not tested."""
import pytest
import torch

from tinyanl import benchmark as module
from tinyanl.benchmark import benchmark, main, ours, theirs

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


def test_a_mistake_is_one_line(capsys):
    for argv in (["--batch", "0"], ["--shape", "none"], ["--device", "none"]):
        one_line(main, argv, capsys)
