"""What samples are held against: each control by its definition."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tinyanl import evaluate, flowers
from tinyanl.data import scan
from tinyanl.encode import encode
from tinyanl.evaluate import Observers, Plan, classes_of, reconstruct, spread_conditions
from tinyanl.experiments import controls as module
from tinyanl.experiments.controls import (
    RealPictures,
    control_rows,
    nearest_copies,
    paint_untouched,
)
from tinyanl.experiments.judge import Judge, pictures
from tinyanl.experiments.report import CONTROLS
from tinyanl.models import Run, training_set
from tinyanl.sample import sample, to_uint8
from tinyanl.tune import tunable


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Four samples of a condition."""
    for some in (evaluate, module):
        monkeypatch.setattr(some, "EACH", 4)


@pytest.fixture
def plan(few):
    return Plan(n=8, steps=2)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A run before its first step."""
    folder = tmp_path_factory.mktemp("data") / "flowers"
    flowers.write(folder, 24)
    names = [picture.path.name for picture in scan(folder, 64).pictures]
    zeros = torch.zeros(base.clip.dim)
    return Run(base, tunable(base), zeros, zeros, 1.0, {"data": folder, "seed": 0}, names)


def test_the_untouched_base_is_that_with_modules_that_change_nothing(run, plan):
    told = torch.randn(plan.n, 128, generator=torch.Generator().manual_seed(3))
    expected = to_uint8(sample(run, told, steps=2, seed=5))  # whatever it is told
    found = paint_untouched(run.base, Plan(n=8, steps=2, seed=5))
    assert found.shape == (8, 3, 64, 64)
    assert_close(found, expected, atol=2, rtol=0)


def test_copies_are_the_nearest_of_all_by_cosine():
    g = torch.Generator().manual_seed(0)
    told = torch.randn(3, 5, generator=g)
    training = torch.randn(9, 5, generator=g) * torch.arange(1, 10)[:, None]
    found = nearest_copies(told.repeat_interleave(4, 0), training).view(3, 4)
    cosines = F.cosine_similarity(told[:, None], training, dim=-1)
    assert torch.equal(found, cosines.argsort(dim=1, descending=True)[:, :4])


def test_every_control_has_as_many_pictures_as_there_are_samples(run, plan, monkeypatch):
    found, train_ids, held_ids = training_set(run)
    x = pictures([picture.path for picture in found], 64)
    classes = classes_of(found)
    real = RealPictures(x[:8], x[8:16], classes[8:16], "fresh")
    observers = Observers(run.base, Judge().eval())
    shown = []

    def watched(samples, reference, training, classes=None):
        shown.append((samples, classes))
        return {"samples": len(samples["clip"]), "real": len(reference["clip"])}

    monkeypatch.setattr(module, "measure", watched)
    rows = control_rows(run, real, plan, observers)
    assert [row["conditions"] for row in rows] == list(CONTROLS)
    assert all(row["samples"] == row["real"] == 8 for row in rows)
    (_, of_base), (copies, asked), (again, _), (others, of_others) = shown
    assert of_base is None and torch.equal(of_others, classes[8:16])

    _, embeddings = encode(run.base, [picture.path for picture in found], latents=False)
    told, of = spread_conditions(embeddings, held_ids, 8)
    assert torch.equal(asked, classes[of])  # right is what was asked for, not what is copied
    expected = nearest_copies(told, embeddings[train_ids, 0])
    assert_close(copies["clip"], embeddings[train_ids[expected], 0], atol=5e-3, rtol=0)
    assert_close(others["clip"], observers.observe(x[8:16])["clip"])
    seen = observers.observe(reconstruct(run.base, x[8:16]))
    assert_close(again["clip"], seen["clip"])
