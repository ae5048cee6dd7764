"""The sample command: pictures are kept as they are decoded, whatever happens then."""

import json
import signal
import weakref

import pytest
import torch
from commands import one_line
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from tinyanl import flowers, train
from tinyanl import sample as module
from tinyanl.models import load_run
from tinyanl.sample import GRID, main, sample, sample_batches, save_pictures, to_uint8


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    for i in range(3):
        flowers.draw(i)[0].save(data / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *args: None)
        out = tmp_path_factory.mktemp("runs") / "run"
        return train.train(data, steps=1, batch=2, out=out, device="cpu")


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, device="cpu")


def test_batches_are_the_parts_of_a_sample(run):
    cond = torch.randn(5, run.base.clip.dim, generator=torch.Generator().manual_seed(0))
    how = dict(mask_rate=0.3, guidance=2.0, steps=2, seed=3, batch=2)
    batches = list(sample_batches(run, cond, **how))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert torch.equal(torch.cat(batches), sample(run, cond, **how))


def interrupting(monkeypatch, number, during):
    """A signal as the second batch of two pictures is sampled, or as its first file is written."""
    batches = module.sample_batches

    def small(run, cond, *rest):
        for k, x in enumerate(batches(run, cond, *rest, batch=2)):
            if k == 1 and during == "sampling":
                signal.raise_signal(number)
            yield x

    written = []

    def converted(picture):
        written.append(picture)
        if len(written) == 3 and during == "writing":
            signal.raise_signal(number)
        return to_pil_image(picture)

    to_pil_image = module.to_pil_image
    monkeypatch.setattr(module, "sample_batches", small)
    monkeypatch.setattr(module, "to_pil_image", converted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("during, kept", [("sampling", 2), ("writing", 4)])
def test_a_signal_keeps_what_is_decoded(
    run, run_folder, tmp_path, number, during, kept, monkeypatch, capsys
):
    monkeypatch.setattr(module, "load_run", lambda *args: run)
    cond = torch.zeros(5, run.base.clip.dim)
    expected = to_uint8(sample(run, cond, steps=2, batch=2))
    interrupting(monkeypatch, number, during)
    argv = ["--run", run_folder, "--n", 5, "--steps", 2, "--out", tmp_path]
    said = one_line(main, argv, capsys, code=130)
    assert f"stopped: {kept} of 5 pictures are in {tmp_path}" in said
    names = {f"{i:04d}.png" for i in range(kept)} | {"grid.png", "sample.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    drawn = [pil_to_tensor(Image.open(tmp_path / f"{i:04d}.png")) for i in range(kept)]
    assert torch.equal(torch.stack(drawn), expected[:kept])
    assert json.loads((tmp_path / "sample.json").read_text())["n"] == 5


def test_a_signal_before_the_first_batch_says_that_nothing_is_there(
    run, run_folder, tmp_path, monkeypatch, capsys
):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        yield

    monkeypatch.setattr(module, "load_run", lambda *args: run)
    monkeypatch.setattr(module, "sample_batches", interrupted)
    argv = ["--run", run_folder, "--n", 2, "--steps", 2, "--out", tmp_path]
    assert "no picture was finished" in one_line(main, argv, capsys, code=130)


def test_the_grid_holds_the_first_pictures_alone_and_no_more_are_in_memory(tmp_path):
    earlier = []

    def batches():
        for k in range(5):
            assert not any(reference() is not None for reference in earlier[:-1])
            x = torch.full((60, 3, 2, 2), k / 2 - 1.0)
            earlier.append(weakref.ref(x))
            yield x

    save_pictures(batches(), 300, tmp_path)
    assert len(list(tmp_path.glob("0*.png"))) == 300
    grid = Image.open(tmp_path / "grid.png")
    assert grid.size == (16 * 4 + 2, 16 * 4 + 2) and GRID == 256
    assert len(earlier) == 5
