"""The suite: every row is made once, and again when it is deleted."""
import dataclasses
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import one_line

from tinyanl import dataset, evaluate, flowers
from tinyanl import train as train_module
from tinyanl.data import file_identity, scan
from tinyanl.encode import encode
from tinyanl.experiments import controls
from tinyanl.experiments import suite as module
from tinyanl.experiments.judge import Judge, class_of
from tinyanl.experiments.report import CONTROLS
from tinyanl.experiments.suite import FIRST, RATES, STEPS, Suite, cells, in_new_process, main, suite
from tinyanl.experiments.suite import Options as SuiteOptions
from tinyanl.loss import denoising_loss
from tinyanl.models import load_base, load_run
from tinyanl.runs import peak_megabytes
from tinyanl.sample import GUIDANCE
from tinyanl.train import LEARNING_RATES, Options, train
from tinyanl.tune import TUNES

RESULTS = Path(__file__).parents[1] / "tutorials/results.json"


def test_every_row_that_is_promised_is_a_cell():
    every = list(cells())
    assert len(every) == 5 * 7 + 13 and len({str(cell) for cell, _ in every}) == len(every)
    for data in ("flowers", "faces", "vehicles"):
        tunes = {cell["tune"] for cell, steps in every if cell["data"] == data and steps == STEPS}
        assert tunes == set(TUNES)
    on_flowers = [cell for cell, _ in every if cell["data"] == "flowers"]
    for tune in TUNES:
        assert {cell["seed"] for cell in on_flowers if cell["tune"] == tune} == {0, 1, 2}
    assert STEPS[:4] == (60, 125, 250, 500)
    long = {(cell["n"], cell["tune"]) for cell in module.long_runs()}
    assert long == set(itertools.product((50, 200, 1000), ("anl", "all", "attention")))
    seeds = {n: seed for n, (_, seed) in module.OVERFITTING_SETS.items()}
    assert seeds[200] == 0 and len({1, *seeds.values()}) == 4  # 1: the fresh flowers


@pytest.mark.parametrize("best", RATES)
def test_the_best_rate_has_the_lowest_held_out_loss_of_all(best, tmp_path, monkeypatch):
    tried = []

    def sweep(self, tune, lr):
        tried.append(lr)
        return {"held-out loss": abs(RATES.index(lr) - RATES.index(best))}

    monkeypatch.setattr(Suite, "sweep", sweep)
    pieces = Suite(tmp_path, SuiteOptions(), {}, None, "some weights")
    assert pieces.best_rate("anl") == best and tried == list(RATES)
    assert pieces.best_rate("anl") == best and tried == list(RATES)  # kept


def test_another_process_returns_what_it_computed_and_raises_what_went_wrong():
    assert in_new_process(os.getpid) != os.getpid()
    held = torch.ones(2**28, dtype=torch.uint8)  # 256 MB, which are not that process's
    assert len(held)
    peak = in_new_process(peak_megabytes, device=torch.device("cpu"))
    assert 50 < peak < peak_megabytes(torch.device("cpu")) - 200
    with pytest.raises(FileNotFoundError, match="nowhere"):
        in_new_process(os.stat, path="nowhere")
    with pytest.raises(ValueError, match="too little memory"):
        in_new_process(functools.partial(os._exit, 1))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Few pictures of every set."""
    folder = tmp_path_factory.mktemp("drawn")
    for name, n in (("flowers", 12), ("fresh flowers", 16), ("faces", 2), ("vehicles", 2)):
        flowers.write(folder / name, n, seed=n)
    return folder


@pytest.fixture
def small(drawn, tmp_path, monkeypatch):
    """A suite of one way to tune, two checkpoints, one ablation, batches of two, rows of few
    samples, no grids, a judge that knows nothing, and no learners, all in this process."""

    def in_this_process(function, **arguments):
        return function(**arguments)

    monkeypatch.setattr(module, "in_new_process", in_this_process)
    for some in (evaluate, controls, module):
        monkeypatch.setattr(some, "EACH", 4)
    def grey(run, cond, **how):
        return torch.zeros(len(cond), 3, 64, 64)

    monkeypatch.setattr(module, "train", functools.partial(train, batch=2))
    monkeypatch.setattr(train_module, "sample", grey)  # for the grids that training draws
    few_samples = functools.partial(dataset.curve_batch, size=4)
    monkeypatch.setattr(dataset, "curve_batch", few_samples)
    monkeypatch.setattr(module, "STEPS", (1, 2))
    monkeypatch.setattr(module, "MASK_RATES", (0.0,))
    monkeypatch.setattr(module, "RATES", (1e-3,))
    monkeypatch.setattr(module, "SWEEP_STEPS", 1)
    monkeypatch.setattr(module, "TUNES", {"anl": TUNES["anl"]})
    few = [(FIRST, (1, 2)), ({**FIRST, "uncentred": True}, (2,))]
    monkeypatch.setattr(module, "cells", lambda: iter(few))
    monkeypatch.setattr(module, "OVERFITTING_SETS", {})
    monkeypatch.setattr(module, "train_judge", lambda folder: (Judge().eval(), 0.5))
    in_another_test = {"tried": "in test_evaluate.py"}
    monkeypatch.setattr(module, "text_figures", lambda *args, **kwargs: in_another_test)
    monkeypatch.setattr(module, "compare", lambda *args, **how: [{"tried": "in test_augment.py"}])
    monkeypatch.setattr(module, "draw_sets", lambda folder: flowers.write(folder / "unlabelled", 2))
    return Path(shutil.copytree(drawn, tmp_path / "suite"))


@pytest.mark.filterwarnings("ignore:8 samples of (128|64) features")
def test_the_suite_goes_on_where_it_stopped(small, capfd):
    results = suite(small, SuiteOptions(n=8, steps=2))
    key = "data=flowers tune=anl seed=0"
    assert list(results) == [
        "setup",
        "sweep tune=anl lr=0.001",
        f"{key} steps=1",
        f"{key} steps=2",
        f"{key} steps=2 guidance=1",
        "controls data=flowers",
        "masks",
        "text",
        f"{key} uncentred=True steps=2",
        "masks uncentred=True",
        "semi-supervised",
    ]
    assert results == json.loads((small / "results.json").read_text())
    assert (small / "flowers.png").stat().st_size
    one = results.pop(f"{key} steps=2")
    plain = results[f"{key} steps=2 guidance=1"]
    assert one["guidance"] == GUIDANCE and plain["guidance"] == 1 and "seconds" not in plain
    assert plain["1000 FD_clip"] != one["1000 FD_clip"]
    assert [row["conditions"] for row in results["controls data=flowers"]] == list(CONTROLS)
    assert {row["samples"] for row in results["controls data=flowers"]} == {one["samples"]}
    assert one["held-out loss"] > 0 and one["peak MB"] > 100 and one["seconds"] > 0
    run = small / "runs/data=flowers,tune=anl,seed=0,steps=2"
    assert torch.load(run / "state.pt", weights_only=True)["frames"].keys() == {0, 2}
    config = json.loads((run / "config.json").read_text())
    assert config["train_mask"] == 0  # the paper's way, not train's default
    assert config["lr"] == one["learning rate"]
    assert one["machine"] == results["setup"]["machine"] and torch.__version__ in one["machine"]

    # the row is made anew, and its run, but no other
    (small / "results.json").write_text(json.dumps(results))
    shutil.rmtree(small / "runs")
    capfd.readouterr()
    again = suite(small, SuiteOptions(n=8, steps=2))
    lines = capfd.readouterr().out.splitlines()
    made = {line.split(":")[0] for line in lines if line.startswith(("data=", "sweep"))}
    assert made == {f"{key} steps=2"} and again[f"{key} steps=1"] == results[f"{key} steps=1"]
    for figure in ("1000 FD_clip", "held-out loss", "trainable"):
        assert again[f"{key} steps=2"][figure] == one[figure]


def test_a_long_run_keeps_its_errors_on_the_way_and_is_made_as_a_part_alone(small, monkeypatch):
    monkeypatch.setattr(module, "OVERFITTING_SETS", {12: ("flowers", 0), 5: ("5 flowers", 2)})
    monkeypatch.setattr(module, "OVERFITTING_TUNES", ("anl",))
    monkeypatch.setattr(module, "OVERFITTING_STEPS", 3)
    monkeypatch.setattr(train_module, "LOG_EVERY", 1)
    options = SuiteOptions(n=8, steps=2)
    keys = [f"overfitting n={n} tune=anl seed=0" for n in (12, 5)]
    results = suite(small, options, part="overfitting")
    assert list(results) == ["setup", "sweep tune=anl lr=0.001", *keys]
    assert not (small / "flowers.png").exists()
    assert len(scan(small / "5 flowers", 64).pictures) == 5
    for key in keys:
        row = results[key]
        steps, training, fresh = zip(*row["curve"], strict=True)
        assert steps == (1, 2, 3) and row["last held-out loss"] == fresh[-1]
        assert row["least held-out loss"] == min(fresh) == fresh[row["at step"] - 1]
        assert len({*training, *fresh}) == 6 and row["learning rate"] == 1e-3

    out = small / "runs/overfitting,n=12,tune=anl,seed=0"
    assert json.loads((out / "config.json").read_text())["train_mask"] == 0
    run = load_run(out, device="cpu")
    found = [picture.path for picture in scan(small / "fresh flowers", 64).pictures]
    latents, embeddings = encode(run.base, found)
    cond = (embeddings - run.mu) / run.sigma
    batch = dataset.curve_batch(latents, cond, torch.arange(16), size=64)
    error = denoising_loss(run, *batch[:4]).item()
    assert error == pytest.approx(results[keys[0]]["last held-out loss"], rel=1e-3)

    del results[keys[1]]
    (small / "results.json").write_text(json.dumps(results))
    assert list(suite(small, options, part="sweep")) == list(results)  # no other row is made


@pytest.mark.parametrize(
    "change, said",
    [
        ({"weights": "unet 0"}, "is of unet 0 and guidance 2, not of unet 1 and guidance 2"),
        ({"guidance": 3.0}, "is of unet 1 and guidance 3, not of unet 1 and guidance 2"),
    ],
)
def test_rows_of_other_weights_or_guidance_are_not_taken_for_these(change, said, tmp_path):
    options = SuiteOptions(guidance=2.0)
    make = iter([[{"x": 1, "guidance": 2.0}, {"x": 2}], {"y": 3, "guidance": 1.0}]).__next__
    pieces = Suite(tmp_path, options, {}, None, "unet 1")
    for _ in range(2):  # made, and then kept
        rows = pieces.piece("masks", make)
        plain = pieces.piece("data=flowers guidance=1", make)
        assert {row["weights"] for row in [*rows, plain]} == {"unet 1"}
    kept = json.loads((tmp_path / "results.json").read_text())
    kept["masks"][0] |= change
    with pytest.raises(ValueError, match=f"'masks' {said}: start in another folder"):
        Suite(tmp_path, options, kept, None, "unet 1").piece("masks", make)
    del kept["data=flowers guidance=1"]["weights"]  # as rows were before they named them
    with pytest.raises(ValueError, match="is of unnamed weights"):
        Suite(tmp_path, options, kept, None, "unet 1").piece("data=flowers guidance=1", make)


def test_a_folder_that_was_begun_with_other_weights_or_flags_is_left_alone(small, monkeypatch):
    monkeypatch.setattr(Suite, "all", lambda self: None)
    options = SuiteOptions(n=8, steps=2)
    results = suite(small, options)
    fingerprints = load_base(device="cpu").fingerprints()
    for part in ("unet", "autoencoder", "clip"):
        assert f"{part} {fingerprints[part][:8]}" in results["setup"]["weights"]
    assert suite(small, options) == results
    changes = {
        "not guidance 1, seed 0": {"guidance": 1.0},
        "seed 0, not": {"seed": 1},
        "samples 8, not 16": {"n": 16},
        "DDIM steps 2, not 4": {"steps": 4},
    }
    for said, change in changes.items():
        with pytest.raises(ValueError, match=said):
            suite(small, dataclasses.replace(options, **change))
    monkeypatch.setattr(module, "named_weights", lambda options: "unet 0")
    with pytest.raises(ValueError, match="weights unet .*not unet 0: start in another folder"):
        suite(small, options)
    assert json.loads((small / "results.json").read_text()) == results


@pytest.mark.filterwarnings("ignore:8 samples of 128 features")
def test_a_family_is_compared_with_the_half_that_no_run_has_seen(small):
    shutil.rmtree(small / "faces")
    flowers.write(small / "faces", 60)
    module.halve(small, "faces")
    pieces = Suite(small, SuiteOptions(n=8, steps=2), {}, None, "some weights")
    row = pieces.row({**FIRST, "data": "faces"}, 1)
    assert row["samples"] == row["real"] == 8 and "not trained on" in row["real are"]
    assert "right kind" not in row

    run = load_run(pieces.run({**FIRST, "data": "faces"}, 1), device="cpu")
    assert Path(run.config["data"]).name == "faces to train on"
    halves = [scan(small / name, 64).pictures for name in ("faces to train on", "fresh faces")]
    assert len(halves[0]) + len(halves[1]) == 60 and min(map(len, halves)) > 8
    identities = [{file_identity(picture.path) for picture in half} for half in halves]
    assert not identities[0] & identities[1]
    things = [{class_of(picture.text) for picture in half} for half in halves]
    assert not things[0] & things[1]  # of a thing that is drawn twice, both are in one half
    real = pieces.real("faces", 64)
    assert len(real.reference) == len(real.others) == 8 and real.classes is None
    real = pieces.real("flowers", 64)
    assert len(real.reference) == len(real.others) == len(real.classes) == 8
    assert not torch.equal(real.reference, real.others)


def test_a_folder_that_another_process_is_at_is_left_alone(small):
    hold = (
        "import sys, time; from tinyanl.runs import claim; from pathlib import Path; "
        "lock = claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", hold, small]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=RESULTS.parents[1])
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="in use by another process"):
            suite(small, SuiteOptions(n=8, steps=2))
    finally:
        other.kill()
        other.wait()
    assert not (small / "results.json").exists()


def test_a_run_that_is_past_a_row_is_named(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text('{"step": 2, "training": 1, "held_out": 1}')
    monkeypatch.setattr(module, "train", lambda **arguments: None)  # nothing is left to do
    with pytest.raises(ValueError, match="at step 2 and cannot be measured at 1: delete"):
        module.train_and_measure(tmp_path, 1, "cpu")


def test_what_stands_in_the_way_is_one_line(tmp_path, capsys):
    assert "families" in one_line(main, [tmp_path], capsys)
    one_line(main, [], capsys)
    mistakes = {
        "--n 40": ["--n", "40"],
        "--n 528: at most 512": ["--n", "528"],
        "steps=0": ["--steps", "0"],
        "steps=30": ["--steps", "30"],
        "--seed -1": ["--seed", "-1"],
        "--part 'overfeeding'": ["--part", "overfeeding"],
    }
    for said, argv in mistakes.items():  # before the folder is looked at
        assert said in one_line(main, [tmp_path / "none", *argv], capsys)


def test_the_default_learning_rates_follow_the_committed_sweep():
    results = json.loads(RESULTS.read_text())
    for tune in TUNES:
        losses = {}
        for key, row in results.items():
            if key.startswith(f"sweep tune={tune} "):
                losses[float(key.split("lr=")[1])] = row["held-out loss"]
        best = min(losses, key=losses.get)
        assert min(losses) < best < max(losses), tune
        assert 0.6 < LEARNING_RATES[tune] / best < 1.7, tune


def test_masks_in_training_are_the_default_as_the_committed_curves_have_it():
    """At equal diversity within a condition, the kind and colour are right more often, on every
    seed."""
    results = json.loads(RESULTS.read_text())

    def curve(key):
        """Diversity within a condition, and the share of right answers, over the mask rates."""
        rows = [row for row in results[key] if row["conditions"] == "held out"]
        within = np.array([row["within"] for row in rows])
        return within, np.array([row["right kind and colour"] for row in rows])

    better = []
    for seed in ("", " seed=1", " seed=2"):
        never = curve(f"masks{seed}")
        within, right = curve(f"masks{seed} train_mask=0.5")
        is_inside = within <= never[0].max()
        better += (right > np.interp(within, *never))[is_inside].tolist()
    assert all(better) and len(better) == 17
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    assert defaults["train_mask"] == 0.5
