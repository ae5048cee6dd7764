"""The suite: every row is made once, by one process after another, and again when it is deleted."""
import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyanl import flowers
from tinyanl.experiments import suite as module
from tinyanl.experiments.judge import Judge
from tinyanl.experiments.suite import FIRST, RATES, STEPS, best_rate, cells, main, suite
from tinyanl.train import LEARNING_RATES, train
from tinyanl.tune import TUNES

from commands import one_line


def test_every_row_that_is_promised_is_a_cell():
    every = list(cells())
    assert len(every) == 5 * 7 + 13 and len({str(cell) for cell, _ in every}) == len(every)
    for data in ("flowers", "faces", "vehicles"):
        assert {cell["tune"] for cell, steps in every if cell["data"] == data and steps == STEPS} == set(TUNES)
    for tune in TUNES:
        assert {0, 1, 2} == {cell["seed"] for cell, _ in every if cell["data"] == "flowers" and cell["tune"] == tune}
    assert STEPS[:4] == (60, 125, 250, 500)


@pytest.mark.parametrize("best", range(5))
def test_the_best_rate_is_found_by_walking_downhill(best):
    tried = []
    assert best_rate(lambda lr: tried.append(lr) or abs(RATES.index(lr) - best)) == RATES[best]
    assert len(set(tried)) == (3 if best == 2 else 4)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A suite of one way to tune, two checkpoints, one ablation, a judge that knows nothing, and no learners."""
    monkeypatch.setattr(module, "STEPS", (1, 2))
    monkeypatch.setattr(module, "MASK_RATES", (0.0,))
    monkeypatch.setattr(module, "RATES", (1e-3,))
    monkeypatch.setattr(module, "SWEEP_STEPS", 1)
    monkeypatch.setattr(module, "TUNES", {"anl": TUNES["anl"]})
    monkeypatch.setattr(module, "cells", lambda: iter([(FIRST, (1, 2)), ({**FIRST, "uncentred": True}, (2,))]))
    monkeypatch.setattr(module, "train_judge", lambda folder: (Judge().eval(), 0.5))
    monkeypatch.setattr(module, "text_figures", lambda *args, **kwargs: {"tried": "in test_evaluate.py"})
    monkeypatch.setattr(module, "compare", lambda *args: [{"tried": "in test_augment.py"}])
    monkeypatch.setattr(module, "draw_sets", lambda folder: flowers.write(folder / "unlabelled", 2))
    for name, n in (("flowers", 12), ("fresh flowers", 64), ("faces", 2), ("vehicles", 2)):
        flowers.write(tmp_path / name, n, seed=n)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_the_suite_goes_on_where_it_stopped(small, capfd):
    results = suite(small, n=32, steps=2)
    key = "data=flowers tune=anl seed=0 steps="
    assert list(results) == ["setup", "sweep tune=anl lr=0.001", f"{key}1", f"{key}2", "masks", "text",
                             key.replace("steps", "uncentred=True steps") + "2", "masks uncentred=True",
                             "semi-supervised"]
    assert results == json.loads((small / "results.json").read_text()) and (small / "flowers.png").stat().st_size
    one = results.pop(f"{key}2")
    assert one["held-out loss"] > 0 and one["peak MB"] > 100 and one["seconds"] > 0
    config = json.loads((small / "runs/data=flowers,tune=anl,seed=0/config.json").read_text())
    assert config["train_mask"] == 0 and config["lr"] == one["learning rate"]  # the paper's way, not train's default
    assert one["machine"] == results["setup"]["machine"] and torch.__version__ in one["machine"]
    (small / "results.json").write_text(json.dumps(results))
    shutil.rmtree(small / "runs")  # the row is made anew, from a run that was never at 1
    capfd.readouterr()
    again = suite(small, n=32, steps=2)
    made = {line.split(":")[0] for line in capfd.readouterr().out.splitlines() if line.startswith(("data=", "sweep"))}
    assert made == {f"{key}2"} and again[f"{key}1"] == results[f"{key}1"]
    for figure in ("1000 FD_clip", "held-out loss", "trainable"):
        assert again[f"{key}2"][figure] == one[figure]


def test_what_stands_in_the_way_is_one_line(small, tmp_path_factory, capsys):
    shutil.rmtree(small / "faces")
    assert "families" in one_line(main, [small], capsys)
    one_line(main, [], capsys)
    for argv, said in ((["--n", "40"], "--n 40"), (["--steps", "0"], "steps=0"), (["--steps", "30"], "steps=30"),
                       (["--seed", "-1"], "--seed -1")):
        assert said in one_line(main, [small / "none", *argv], capsys)  # before the folder is looked at


def test_the_default_learning_rates_follow_the_committed_sweep():
    results = json.loads((Path(__file__).parents[1] / "tutorials/results.json").read_text())
    for tune in TUNES:
        losses = {float(key.split("lr=")[1]): row["held-out loss"] for key, row in results.items()
                  if key.startswith(f"sweep tune={tune} ")}
        best = min(losses, key=losses.get)
        assert min(losses) < best < max(losses) and 0.6 < LEARNING_RATES[tune] / best < 1.7, tune


def test_masks_in_training_are_the_default_as_the_committed_curves_have_it():
    """At equal diversity within a condition, the kind and colour are right more often, on every seed."""
    results, better = json.loads((Path(__file__).parents[1] / "tutorials/results.json").read_text()), []
    for seed in ("", " seed=1", " seed=2"):
        never, met = (np.array([(row["within"], row["right kind and colour"]) for row in results[f"masks{seed}{how}"]
                                if row["conditions"] == "held out"]).T for how in ("", " train_mask=0.5"))
        better += (met[1] > np.interp(met[0], *never))[met[0] <= never[0].max()].tolist()
    assert all(better) and len(better) == 17 and inspect.signature(train).parameters["train_mask"].default == 0.5
