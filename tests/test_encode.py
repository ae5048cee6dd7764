"""Encoding: caches that are another set's, several processes, pictures decoded by workers."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinyanl import flowers
from tinyanl.data import scan
from tinyanl.encode import encode

module = sys.modules["tinyanl.encode"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "flowers"
    flowers.write(folder, 13)
    return [picture.path for picture in scan(folder, 64).pictures]


@pytest.fixture(scope="module")
def expected(base, paths):
    return encode(base, paths, batch=2)


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def stop_at(monkeypatch, path):
    """Ctrl-C as the picture `path` is opened."""
    opened = module.open_rgb

    def interrupted(asked):
        if asked == path:
            raise KeyboardInterrupt
        return opened(asked)

    monkeypatch.setattr(module, "open_rgb", interrupted)


def test_numbers_of_another_set_are_never_taken_for_those_of_the_first(
    base, paths, expected, tmp_path, monkeypatch
):
    """X, then a part of Y over it, then X again: progress.json still named X all the while."""
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    x, y = paths[:8], paths[5:]
    encode(base, x, batch=2, cache=tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, y[4])
        encode(base, y, batch=2, cache=tmp_path)
    assert (
        json.loads((tmp_path / "progress.json").read_text())["done"] == 0
    )  # fewer than SAVE_EVERY
    again = encode(base, x, batch=2, cache=tmp_path)
    assert equal(again, [numbers[:8] for numbers in expected])


def test_another_set_is_named_before_its_first_byte_is_written(base, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    encode(base, paths[:2], cache=tmp_path)
    before = {
        name: (tmp_path / name).read_bytes() for name in ("latents", "embeddings", "progress.json")
    }
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, paths[2])
        encode(base, paths[2:4], cache=tmp_path)
    after = {name: (tmp_path / name).read_bytes() for name in before}
    assert after["latents"] == before["latents"] and after["embeddings"] == before["embeddings"]
    assert json.loads(after["progress.json"])["of"] != json.loads(before["progress.json"])["of"]


@pytest.mark.skipif(sys.platform != "linux", reason="room is asked for on Linux")
def test_a_cache_that_does_not_fit_is_said_before_anything_is_encoded(
    base, paths, tmp_path, monkeypatch
):
    """Written through the mapping, it would have been a bus error."""
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr(module, "open_rgb", None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"needs 79,872 bytes \(File too large\): make room"):
            encode(base, paths, cache=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_workers_keep_the_order_the_numbers_and_the_errors(
    base, paths, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "MANY", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    state = torch.get_rng_state()
    assert equal(encode(base, paths, batch=2), expected)
    assert torch.equal(torch.get_rng_state(), state)  # a DataLoader draws a number where it may
    (tmp_path / "broken.png").write_bytes(paths[0].read_bytes()[:900])
    with pytest.raises(ValueError, match="broken.png: truncated") as error:
        encode(base, [*paths[:5], tmp_path / "broken.png", *paths[5:]], batch=2)
    assert "\n" not in str(error.value)


PROCESSES = """if True:
    import sys
    from pathlib import Path
    import torch
    from tinyanl import models, runs
    from tinyanl import encode as _
    module = sys.modules["tinyanl.encode"]
    models.has_bf16 = lambda device: False  # as in conftest.py
    out, broken, *paths = map(Path, sys.argv[1:])
    rank, _ = runs.join_processes()
    base = models.load_base(device="cpu")
    found = {"memory": module.encode(base, paths, batch=2)}
    module.IN_MEMORY, module.SAVE_EVERY = 0, 2
    found["files"] = module.encode(base, paths, batch=2, cache=out / "cache")
    found["files again"] = module.encode(base, paths, batch=2, cache=out / "cache")
    try:
        module.encode(base, [*paths[:2], broken], batch=2)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, out / f"{rank}.pt")
    torch.distributed.destroy_process_group()
"""


def test_two_processes_encode_a_part_each_and_both_get_all_the_same_numbers(
    paths, expected, tmp_path
):
    (tmp_path / "two.py").write_text(PROCESSES)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *torchrun, tmp_path / "two.py", tmp_path, broken, *paths],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": Path(__file__).parents[1]},
    )
    assert done.returncode == 0, done.stderr
    for rank in 0, 1:
        found = torch.load(tmp_path / f"{rank}.pt")
        assert "broken.png" in found.pop("error")  # which the second process met
        assert found.keys() == {"memory", "files", "files again"}
        for how, numbers in found.items():
            assert equal(numbers, expected), how
    assert json.loads((tmp_path / "cache/progress.json").read_text())["done"] == 13
