"""Evaluation: the judge, rows against closed cases, and the command."""
import json

import pytest
import torch

from tinyanl import evaluate as module, flowers, train
from tinyanl.data import scan
from tinyanl.encode import embed_pictures
from tinyanl.evaluate import evaluate, look, main, measure, table, text_figures
from tinyanl.experiments.judge import CLASSES, class_of, pictures
from tinyanl.metrics import frechet_distance, inception_score
from tinyanl.models import EMBEDDED, generator, load_base, load_run

from commands import one_line


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "flowers"
    flowers.write(folder, 96, seed=9)
    return folder


@pytest.fixture(scope="module")
def run_folder(real, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return train.train(real, steps=2, batch=2, out=out, device="cpu", sample_every=9)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    judge, accuracy = module.train_judge(folder, n=300, epochs=24)
    again, _ = module.train_judge(folder, n=300)  # kept
    assert all(torch.equal(a, b) for a, b in zip(judge.state_dict().values(), again.state_dict().values()))
    assert accuracy > 0.15, accuracy  # 43 classes: chance is 2 %, and 300 flowers are few
    return judge


def test_captions_of_flowers_have_classes_and_others_none():
    assert len(CLASSES) == 43 == len(set(CLASSES))
    found = {class_of(flowers.draw(i)[1]) for i in range(90)}
    assert None not in found and len(found) > 25
    assert CLASSES[class_of("a red rosette on a stem in a meadow")] == "red rosette"
    assert class_of("a red rosettes") is class_of(None) is class_of("a car") is None


@pytest.mark.filterwarnings("ignore:.*samples of 128 features")
def test_real_pictures_against_themselves_are_perfect_and_copies_are_found(real):
    base = load_base(device="cpu")
    x = pictures([p.path for p in scan(real, 64).pictures], 64)
    own = embed_pictures(base, x)
    torch.testing.assert_close(own, base.clip.embed(x / 127.5 - 1), atol=2e-3, rtol=0)  # 64 px: nothing is resized
    row = measure(look(base, x), look(base, x), own)
    assert row["samples"] == row["real"] == 96 and abs(row["1000 FD_clip"]) < 1e-3
    assert row["precision"] == row["recall"] == 1 and row["nearest training picture"] == pytest.approx(1)
    same = measure(look(base, x[:1].repeat(32, 1, 1, 1)), look(base, x), own)
    assert same["within"] == pytest.approx(0, abs=1e-5) and same["recall"] < 0.2
    assert same["1000 FD_clip"] > 10


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_rows_say_what_they_are_and_the_floor_comes_last(run_folder, real, judge):
    run, x = load_run(run_folder, device="cpu"), pictures([p.path for p in scan(real, 64).pictures], 64)
    rows = evaluate(run, x, rates=(0.0, 1.0), n=32, steps=2, judge=judge)
    assert [(row["conditions"], row.get("rate")) for row in rows] == [
        ("training", 0.0), ("training", 1.0), ("held out", 0.0), ("held out", 1.0), ("real", None)]
    assert all(row["samples"] == 32 for row in rows)
    assert all(0 <= row["right kind and colour"] <= 1 for row in rows[:4])
    assert rows[-1]["FD_judge"] < min(row["FD_judge"] for row in rows[:4])  # two steps of training paint no flowers
    assert evaluate(run, x, n=32, steps=2, sets=("held out",))[0]["1000 FD_clip"] == rows[2]["1000 FD_clip"]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    for n in (40, 16, 4096):
        with pytest.raises(ValueError, match=f"{n} samples against 96 real"):
            evaluate(run, x, n=n)


def test_text_figures_are_those_of_the_captions(run_folder, real, judge):
    figures = text_figures(load_run(run_folder, device="cpu"), scan(real, 64).pictures, judge, each=1, steps=2)
    assert figures["samples"] == 43 and figures["chance"] == 1 / 43
    assert figures["R-precision of real by CLIP"] > 0.5  # it has read such captions
    assert figures["R-precision of real by the judge"] > 0.1
    assert figures["R-precision of samples by CLIP"] < 0.5  # two steps of training


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_the_command_prints_and_saves_the_table(run_folder, real, capsys, monkeypatch, judge):
    monkeypatch.setattr(module, "train_judge", lambda folder: (judge, 0.5))
    main(["--run", str(run_folder), "--real", str(real), "--n", "32", "--steps", "2", "--rates", "0", "0.5"])
    said = capsys.readouterr().out
    rows = json.loads((run_folder / "evaluation.json").read_text())["rows"]
    assert len(rows) == 5 and said.count("held out") == 2 and "50.0% of real flowers" in said
    for argv in ([], ["--run", "x"], ["--run", "nowhere", "--real", "y"]):
        one_line(main, argv, capsys)
    monkeypatch.setattr(module, "train_judge", None)  # nothing slow before what is wrong is said
    asked = ["--run", run_folder, "--real", real]
    assert "96 pictures, --n 112" in one_line(main, [*asked, "--n", "112"], capsys)
    for mistake in (["--steps", "30"], ["--seed", "-1"], ["--n", "40"], ["--rates", "2"]):
        assert mistake[0] in one_line(main, [*asked, *mistake], capsys) or mistake[0] == "--steps"


def test_the_command_draws_its_real_pictures_from_all_classes(run_folder, real, tmp_path, monkeypatch):
    """They are listed class by class: the first 32, or the next, would be of one class and no floor for the other."""
    for i, picture in enumerate(scan(real, 64).pictures):
        (tmp_path / "ab"[i // 48]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i // 48] / picture.path.name).write_bytes(picture.path.read_bytes())
    seen = []
    monkeypatch.setattr(module, "pictures", lambda paths, size: seen.extend(paths) or torch.zeros(64, 3, 64, 64))
    monkeypatch.setattr(module, "evaluate", lambda run, real, *rest: [{}])
    main(["--run", str(run_folder), "--real", str(tmp_path), "--n", "32"])
    for part in seen[:32], seen[32:]:
        assert len(part) == 32 and 6 < sum(path.parent.name == "a" for path in part) < 26
    assert len(set(seen)) == 64


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_the_command_adds_fid_and_inception_score_given_their_weights(run_folder, real, judge, tmp_path,
                                                                      capsys, monkeypatch):
    """Mean colours in place of Inception's features: those of 48 real pictures and 48 others are computed here, too."""
    shapes = {"Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1), "fc.weight": (1008, 2048)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "inception.pth")
    given, look_at = [], lambda x: (x.mean((2, 3)), 9 * x.mean((2, 3)))
    monkeypatch.setattr(module, "inception", lambda state: given.append(state) or look_at)
    monkeypatch.setattr(module, "train_judge", lambda folder: (judge, 0.5))
    main(["--run", str(run_folder), "--real", str(real), "--n", "48", "--steps", "2",
          "--inception", str(tmp_path / "inception.pth")])
    *rows, floor = json.loads((run_folder / "evaluation.json").read_text())["rows"]
    assert {name: tuple(x.shape) for name, x in given[0].items()} == shapes
    paths = [picture.path for picture in scan(real, 64).pictures]
    order = torch.randperm(96, generator=generator(0, 0))
    features, logits = look_at(pictures([paths[i] for i in order], 64) / 127.5 - 1)
    assert floor["FID"] == pytest.approx(frechet_distance(features[48:], features[:48]), rel=1e-4)
    shuffled = logits[48:][torch.randperm(48, generator=generator(0, 0))]
    assert (floor["IS"], floor["IS deviation"]) == pytest.approx(inception_score(shuffled), rel=1e-4)
    assert all(row["FID"] > floor["FID"] for row in rows)
    wrong = ["--run", run_folder, "--real", real, "--n", "48", "--inception", EMBEDDED / "clip.pt"]
    capsys.readouterr()
    assert "not FID's Inception" in one_line(main, wrong, capsys)
