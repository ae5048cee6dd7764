"""The small learner: what it learns from, and every way that is compared."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from commands import one_line

from tinyanl import flowers, train
from tinyanl.experiments import semi_supervised as module
from tinyanl.experiments.judge import Judge, judged, pictures, share
from tinyanl.experiments.semi_supervised import (
    KIND,
    STRONG,
    WEAK,
    choose_labelled,
    compare,
    fixmatch,
    kind_of,
    main,
    ridge_regression,
    views,
)
from tinyanl.models import load_run


def test_a_kind_is_read_from_a_caption():
    assert [KIND[kind_of(f"a red {kind} in a meadow")] for kind in KIND] == KIND
    with pytest.raises(ValueError, match="'a red car' names none"):
        kind_of("a red car")


def test_views_differ_and_stay_in_range():
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=g)
    for change in (WEAK, STRONG):
        torch.manual_seed(0)
        one = views(change, x)
        two = views(change, x)
        assert one.shape == x.shape and one.min() >= -1 and one.max() <= 1
        assert not torch.equal(one, two)


def stripes(classes, g):
    """Pictures of two, four or eight stripes, lying or standing, of any colours: easy."""
    n = len(classes)
    colours = torch.randint(0, 256, (n, 2, 3), generator=g)
    colours[:, 1] = (colours[:, 0] + 128) % 256
    number = 4 << classes % 3  # N
    which = torch.arange(64) * number[:, None] // 64 % 2  # N 64
    lying = which[:, :, None].expand(-1, 64, 64)
    standing = which[:, None].expand(-1, 64, 64)
    which = torch.where((classes < 3)[:, None, None], standing, lying)  # N 64 64
    x = colours[torch.arange(n)[:, None, None], which]  # N 64 64 3
    return x.movedim(-1, 1).to(torch.uint8)


def test_the_learner_learns_stripes_and_repeats():
    """Unlabelled pictures do no harm."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(6).repeat(4)
    truth = torch.arange(6).repeat(10)
    x = stripes(y, g)
    more = stripes(y, g)
    test = stripes(truth, g)
    models = [fixmatch(x, y, test, (more, y), seed=0, steps=3, batch=16) for _ in range(2)]
    one, two = [model.state_dict() for model in models]
    assert all(torch.equal(one[name], two[name]) for name in one)
    learned = fixmatch(x, y, None, None, seed=0, steps=100, batch=16)
    assert share(judged(learned, test)[1], truth) > 0.6


@pytest.mark.parametrize("confidence, counted", [(1.1, 0), (0.0, 32)])
def test_confident_guesses_alone_count_and_classes_stay_with_their_pictures(
    confidence, counted, monkeypatch
):
    shown = []
    seen = []
    true_views = module.views
    true_loss = F.cross_entropy

    def watched_views(change, x):
        shown.append(x)
        return true_views(change, x)

    def watched_loss(logits, target, **how):
        logits.retain_grad()
        seen.append((logits, target))
        return true_loss(logits, target, **how)

    monkeypatch.setattr(module, "CONFIDENCE", confidence)
    monkeypatch.setattr(module, "views", watched_views)
    monkeypatch.setattr(F, "cross_entropy", watched_loss)
    y = torch.arange(6)
    x = (40 * y).byte().view(6, 1, 1, 1).expand(6, 3, 64, 64)
    fixmatch(x, y, x, (x, y), seed=0, steps=1, batch=16)
    (_, classes), (strong, _) = seen
    assert torch.equal(shown[0][:, 0, 0, 0] // 40, classes)
    assert (strong.grad.abs().sum(1) > 0).sum() == counted


def test_half_of_a_labelled_batch_is_generated():
    x = torch.arange(5)[:, None]
    more = (100 + torch.arange(7)[:, None], torch.arange(7))
    g = torch.Generator().manual_seed(0)
    shown, classes = module.labelled_batch(x, torch.arange(5), more, 8, g)
    assert (shown[:4] < 100).all() and (shown[4:] >= 100).all()
    assert torch.equal(shown[:, 0] % 100, classes)


def test_so_many_of_each_kind_are_labelled_and_seeds_choose_others():
    kinds = torch.arange(60) % 6
    chosen = [choose_labelled(kinds, 4, seed) for seed in (0, 1, 0)]
    for some in chosen:
        assert torch.equal(kinds[some], torch.arange(6).repeat_interleave(4))
        assert len(some.unique()) == 24
    assert torch.equal(chosen[0], chosen[2]) and not torch.equal(chosen[0], chosen[1])


def test_ridge_regression_is_the_minimum_of_its_loss():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=g, dtype=torch.float64)
    y = torch.randn(20, 3, generator=g, dtype=torch.float64)
    x, y = x.float(), y.float()
    found = ridge_regression(x, y).requires_grad_()
    ((x @ found - y).square().sum() + found.square().sum()).backward()
    torch.testing.assert_close(found.grad, torch.zeros(5, 3), atol=1e-3, rtol=0)


def test_generated_pictures_have_the_class_of_their_source(tmp_path, monkeypatch):
    for i, name in enumerate(("labelled", "unlabelled", "test")):
        flowers.write(tmp_path / name, 6 if i else 24, seed=70 + i)
    seen = []

    def copies(run, paths, n, *rest):
        return pictures(paths, 64)[:, None].repeat(1, n, 1, 1, 1), None

    def untrained(*args, **how):
        seen.append(args)
        return Judge(6).eval()

    monkeypatch.setattr(module, "augment", copies)
    monkeypatch.setattr(module, "fixmatch", untrained)
    monkeypatch.setattr(module, "clip_rows", lambda *args: {})
    run = SimpleNamespace(base=None, model=torch.nn.Identity())
    compare(run, tmp_path, [2], seeds=1, per_image=3)
    x, y, _, (more, classes), *_ = seen[-1]
    assert torch.equal(more, x.repeat_interleave(3, 0))
    assert torch.equal(classes, y.repeat_interleave(3))


def test_every_way_is_compared(tmp_path, monkeypatch):
    for i, (name, n) in enumerate((("labelled", 24), ("unlabelled", 12), ("test", 12))):
        flowers.write(tmp_path / name, n, seed=70 + i)
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(train, "draw", lambda *args: None)
    out = tmp_path / "run"
    train.train(data=tmp_path / "unlabelled", steps=1, batch=2, out=out, device="cpu")
    run = load_run(out, device="cpu")
    how = {"seeds": 2, "per_image": 1, "mask_rate": 0.3, "steps": 1}
    rows = compare(run, tmp_path, [1, 2], **how)
    names = [
        "labelled only",
        "+ generated",
        "+ unlabelled",
        "+ unlabelled + generated",
        "CLIP, zero-shot",
        "CLIP, linear probe",
    ]
    found = [(row["labels a kind"], row["learned from"]) for row in rows]
    assert found == [(count, name) for count in (1, 2) for name in names]
    assert all(0 <= row["accuracy"] <= 1 and row["seeds"] == 2 for row in rows)
    assert rows[4]["accuracy"] > 0.5  # CLIP has read captions of flowers
    monkeypatch.setattr(module, "accuracies", None)  # nothing is computed again
    assert compare(run, tmp_path, [1, 2], **how) == rows
    with pytest.raises(TypeError):  # but with another guidance it is, and for another run
        compare(run, tmp_path, [1, 2], **how, guidance=1.0)
    with torch.no_grad():
        next(run.model.parameters()).add_(1)
    with pytest.raises(TypeError):
        compare(run, tmp_path, [1, 2], **how)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--labels", "1", "17"], "--labels"),
        (["--seeds", "0"], "--seeds 0"),
        (["--steps", "0"], "--steps 0"),
        (["--labels"], "--labels"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_drawn(argv, said, tmp_path, capsys):
    assert said in one_line(main, [tmp_path / "new", *argv], capsys)
    assert not (tmp_path / "new").exists()


def test_the_run_that_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "draw_sets", lambda folder: None)
    assert "first train on the unlabelled" in one_line(main, [tmp_path], capsys)
