"""Runs beside their base and pictures: bf16 switched on, moved folders, changed files, seeds."""

import shutil
from dataclasses import replace

import pytest
import torch
from commands import one_line
from PIL import Image

from tinyanl import augment, evaluate, flowers, models, sample, train
from tinyanl.loss import denoising_loss
from tinyanl.models import EMBEDDED, Run, load_run, split, training_set
from tinyanl.tune import tunable


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "flowers"
    flowers.write(folder, 12)
    return folder


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *args: None)
        return train.train(data, steps=1, batch=2, seed=3, out=out, device="cpu")


# --- bf16, which conftest.py switches off elsewhere


@pytest.fixture
def bf16_base(base):
    return replace(base, bf16=True)


@pytest.fixture
def batch(base):
    g = torch.Generator().manual_seed(0)
    z0, eps = torch.randn(2, 2, *base.latent_shape, generator=g)
    return z0, torch.randn(2, base.clip.dim, generator=g), torch.tensor([100, 700]), eps


def a_run(base):
    torch.manual_seed(0)
    model = tunable(base)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)  # a fresh one is the identity, whatever it is rounded to
    return Run(base, model, None, None, 1.0, {}, [])


def test_a_frozen_run_is_rounded_and_leaves_its_base_and_its_model_as_they_are(bf16_base, batch):
    run = a_run(bf16_base)
    z, cond, t, _ = batch
    fingerprints = bf16_base.fingerprints()
    trained = {name: p.clone() for name, p in run.model.state_dict().items()}
    with torch.no_grad():
        expected = run.bind(cond)(z, t)
        found = run.frozen().bind(cond)(z, t)
    assert torch.equal(found, expected)  # to bf16 once, and at every evaluation: the same numbers
    assert bf16_base.fingerprints() == fingerprints
    assert all(torch.equal(p, trained[name]) for name, p in run.model.state_dict().items())
    for module in bf16_base.unet, run.model:
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    for module in run.frozen().base.unet, run.frozen().model:
        assert {p.dtype for p in module.parameters() if p.dim() > 1} == {torch.bfloat16}
        assert not any(p.requires_grad for p in module.parameters())


def test_runs_on_one_base_share_one_rounded_copy_of_it(bf16_base):
    one, two = a_run(bf16_base).frozen(), a_run(bf16_base).frozen()
    assert one.base.unet is two.base.unet and one.model is not two.model
    assert one.base.autoencoder is bf16_base.autoencoder and one.base.clip is bf16_base.clip
    assert (
        one.frozen().base.bf16
        and a_run(replace(bf16_base, bf16=False)).frozen().base.unet is bf16_base.unet
    )


def test_training_does_not_notice_that_another_run_on_its_base_was_frozen(bf16_base, batch):
    def gradients():
        run = a_run(bf16_base)
        loss = denoising_loss(run, *batch)
        loss.backward()
        return loss.detach(), [p.grad for p in run.model.parameters()]

    before = gradients()
    a_run(bf16_base).frozen()
    torch.testing.assert_close(gradients(), before, rtol=0, atol=0)


def test_a_run_trained_in_bf16_comes_back_beside_a_base_that_still_trains(
    base, data, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "has_bf16", lambda device: True)
    shared = replace(base, bf16=True)
    for module in train, models:
        monkeypatch.setattr(module, "load_base", lambda *args: shared)
    monkeypatch.setattr(train, "draw", lambda *args: None)
    fingerprints = shared.fingerprints()
    settings = dict(batch=2, sample_every=9, device="cpu")
    monkeypatch.setattr(train, "cosine", lambda highest, step, steps: highest)  # for 1 or 2 steps
    train.train(data, steps=1, out=tmp_path / "run", **settings)
    run = load_run(tmp_path / "run")
    assert sample.sample(run, torch.zeros(1, base.clip.dim), steps=2).isfinite().all()
    assert shared.fingerprints() == fingerprints
    train.train(data, steps=2, out=tmp_path / "run", resume=True, **settings)
    train.train(data, steps=2, out=tmp_path / "whole", **settings)
    again, whole = (
        torch.load(tmp_path / name / "adapter.pt")["trained"] for name in ("run", "whole")
    )
    torch.testing.assert_close(again, whole, rtol=0, atol=0)


# --- the pictures that a run was trained on


@pytest.fixture
def moved(data, run_folder, tmp_path):
    """A run whose folder of pictures lies elsewhere now, loaded, and that folder."""
    run = load_run(run_folder, device="cpu")
    run.config = run.config | {"data": str(tmp_path / "gone")}
    return run, shutil.copytree(data, tmp_path / "here")


def test_pictures_come_back_with_the_split_they_were_trained_with(run_folder, data):
    found, train_ids, held_ids = training_set(load_run(run_folder, device="cpu"))
    assert [picture.path.parent for picture in found] == [data] * 12
    for ids, expected in zip((train_ids, held_ids), split(range(12), 3), strict=True):
        assert torch.equal(ids, expected)


def test_a_moved_folder_is_named_by_trained_on(moved):
    run, here = moved
    with pytest.raises(FileNotFoundError, match="gone.*--trained-on"):
        training_set(run)
    found, train_ids, _ = training_set(run, here)
    assert found[0].path.parent == here and len(train_ids) == 11


def test_other_names_are_refused(moved):
    run, here = moved
    (here / "metadata.jsonl").unlink()
    (here / "00003.png").rename(here / "another.png")
    with pytest.raises(ValueError, match="does not have this run's 12 pictures.*--trained-on"):
        training_set(run, here)


def test_other_pictures_under_the_same_names_are_refused(moved):
    run, here = moved
    Image.new("RGB", (64, 64), "red").save(here / "00003.png")
    with pytest.raises(ValueError, match=r"1 other pictures.*00003.png.*--trained-on"):
        training_set(run, here)
    run.files = []  # as in adapters from before identities were kept
    assert len(training_set(run, here)[0]) == 12


@pytest.mark.filterwarnings("ignore:.*samples of 128 features")
def test_the_commands_take_the_moved_folder(run_folder, data, tmp_path, capsys):
    adapter = torch.load(run_folder / "adapter.pt")
    assert len(adapter["files"]) == len(adapter["pictures"]) == 12
    adapter["config"]["data"] = str(tmp_path / "gone")
    (tmp_path / "run").mkdir()
    torch.save(adapter, tmp_path / "run/adapter.pt")
    (tmp_path / "labelled").mkdir()
    for name in "abc":
        shutil.copytree(data, tmp_path / "labelled" / name)
        (tmp_path / "labelled" / name / "metadata.jsonl").unlink()
    argv = ["--run", tmp_path / "run", "--steps", 2, "--device", "cpu"]
    more = tmp_path / "more"
    commands = [
        (evaluate.main, ["--real", tmp_path / "labelled", "--n", 32]),
        (augment.main, ["--data", tmp_path / "labelled", "--out", more, "--per-image", 1]),
    ]
    for main, own in commands:
        assert "--trained-on" in one_line(main, [*argv, *own], capsys)
    shutil.rmtree(more)
    for main, own in commands:
        main([str(word) for word in [*argv, *own, "--trained-on", data]])


# --- weights and seeds


def test_moved_weights_are_named_by_the_flag(run_folder, tmp_path):
    adapter = torch.load(run_folder / "adapter.pt")
    adapter["config"]["weights"] = str(tmp_path / "weights")
    torch.save(adapter, tmp_path / "adapter.pt")
    with pytest.raises(FileNotFoundError, match="trained on the weights in .*weights.*--weights"):
        load_run(tmp_path, device="cpu")
    assert load_run(tmp_path, weights=EMBEDDED, device="cpu").base.size == 64


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_seeds_that_repeat_others_are_refused(seed, base, tmp_path, capsys):
    """torch's generator on the CPU keeps 32 bits: seed 2**32 gives the numbers of seed 0."""
    cond = torch.zeros(1, base.clip.dim)
    for use in (
        models.check_seed,
        lambda seed: models.generator(seed, 0),
        lambda seed: sample.sample(a_run(base), cond, steps=2, seed=seed),
    ):
        with pytest.raises(ValueError, match=f"{seed} must be between 0 and 4294967295"):
            use(seed)
    models.check_seed(2**32 - 1)
    for main in sample.main, evaluate.main, augment.main:
        argv = ["--run", tmp_path, "--seed", seed]
        argv += {
            evaluate.main: ["--real", "x"],
            augment.main: ["--data", "x", "--out", tmp_path / "x"],
        }.get(main, [])
        assert "--seed" in one_line(main, argv, capsys)
