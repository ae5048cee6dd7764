"""Evaluation: the judge, rows against closed cases, and the command."""

import json
from types import SimpleNamespace

import pytest
import torch
from commands import flags, one_line

from tinyanl import evaluate as module
from tinyanl import flowers, train
from tinyanl.data import scan
from tinyanl.encode import embed_pictures
from tinyanl.evaluate import (
    Observers,
    Plan,
    classes_of,
    evaluate,
    main,
    measure,
    reconstruct,
    text_figures,
)
from tinyanl.experiments import judge as judge_module
from tinyanl.experiments.judge import CLASSES, Judge, class_of, judged, pictures, right_answers
from tinyanl.metrics import frechet_distance, inception_score
from tinyanl.models import EMBEDDED, generator, load_run
from tinyanl.runs import save
from tinyanl.sample import GUIDANCE, sample
from tinyanl.table import table


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "flowers"
    flowers.write(folder, 64, seed=9)
    return folder


@pytest.fixture(scope="module")
def run_folder(real, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *args: None)
        return train.train(real, steps=2, batch=2, out=out, device="cpu")


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, device="cpu")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    judge, accuracy = module.train_judge(folder, n=300, epochs=24)
    again, _ = module.train_judge(folder, n=300)  # kept
    assert all(
        torch.equal(a, b)
        for a, b in zip(judge.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert accuracy > 0.15, accuracy  # 43 classes: chance is 2 %, and 300 flowers are few
    return judge


def test_captions_of_flowers_have_classes_and_others_none(real):
    assert len(CLASSES) == 43 == len(set(CLASSES))
    found = {class_of(picture.text) for picture in scan(real, 64).pictures}
    assert None not in found and len(found) > 25
    assert CLASSES[class_of("a red rosette on a stem in a meadow")] == "red rosette"
    assert class_of("a red rosettes") is class_of(None) is class_of("a car") is None


def test_a_judge_learns_from_sharp_and_from_soft_pictures():
    """Of white noise a blur takes nearly all of the variance, a faint one nearly nothing."""
    seen = []

    class Witness(torch.nn.Linear):
        def forward(self, view):
            seen.append(view.var((1, 2, 3)))
            return view, super().forward(view[:, 0, 0])

    x = torch.randint(256, (64, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    judge_module.fit(Witness(64, 43), x.byte(), torch.zeros(64, dtype=torch.int64), steps=4)
    kept = torch.cat(seen) / (x / 127.5 - 1).var()
    assert kept.max() > 0.9 and kept.min() < 0.2 and len(kept) == 4 * 128


def test_a_judge_that_never_met_a_blur_is_not_kept(judge, tmp_path):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers/metadata.jsonl").touch()
    old = {"config": {"n": 300}, "judge": judge.state_dict(), "accuracy": 0.9}
    save(old, tmp_path / "judge.pt")
    with pytest.raises(ValueError, match=r"judge\.pt.*lacks blur.*train again"):
        judge_module.train_judge(tmp_path, n=300)


@pytest.mark.filterwarnings("ignore:.*samples of 128 features")
def test_real_pictures_against_themselves_are_perfect_and_copies_are_found(base, real):
    x = pictures([p.path for p in scan(real, 64).pictures], 64)
    own = embed_pictures(base, x)
    expected = base.clip.embed(x / 127.5 - 1)  # at 64 px nothing is resized
    torch.testing.assert_close(own, expected, atol=2e-3, rtol=0)
    look = Observers(base).observe
    row = measure(look(x), look(x), own)
    assert row["samples"] == row["real"] == 64 and abs(row["1000 FD_clip"]) < 1e-3
    assert row["precision"] == row["recall"] == 1
    assert row["nearest training picture"] == pytest.approx(1)
    same = measure(look(x[:1].repeat(32, 1, 1, 1)), look(x), own)
    assert same["within"] == pytest.approx(0, abs=1e-5) and same["recall"] < 0.2
    assert same["1000 FD_clip"] > 10


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_rows_say_what_they_are_and_the_floor_comes_last(run, real, judge):
    found = scan(real, 64).pictures
    x, classes = pictures([picture.path for picture in found], 64), classes_of(found)
    rows = evaluate(run, x, Plan((0.0, 1.0), n=32, steps=2), judge, classes=classes)
    assert [(row["conditions"], row.get("rate")) for row in rows] == [
        ("training", 0.0),
        ("training", 1.0),
        ("held out", 0.0),
        ("held out", 1.0),
        ("reconstructions", None),
        ("real", None),
    ]
    assert all(row["samples"] == 32 for row in rows)
    assert (
        len({frozenset(row.keys() - {"rate", "guidance", "steps"}) for row in rows}) == 1
    )  # every measure for every row
    for row in rows:
        assert 0 <= row["right kind and colour"] <= min(row["right kind"], row["right colour"]) <= 1
    assert (
        rows[-1]["right kind and colour"]
        == right_answers(judged(judge, x[32:64])[1], classes[32:64])["right kind and colour"]
    )
    sampled = min(row["1000 FD_clip"] for row in rows[:4])  # two steps of training paint no flowers
    assert rows[-1]["1000 FD_clip"] < sampled and rows[-2]["1000 FD_clip"] < sampled
    again, *_ = evaluate(run, x, Plan(n=32, steps=2, sets=("held out",)))
    assert again["1000 FD_clip"] == rows[2]["1000 FD_clip"] and "right kind" not in again
    assert {row["guidance"] for row in rows[:4]} == {GUIDANCE}
    plain, *_ = evaluate(run, x, Plan(n=32, steps=2, sets=("held out",), guidance=1.0))
    assert plain["guidance"] == 1 and plain["1000 FD_clip"] != again["1000 FD_clip"]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.count("|") for line in lines}) == 1
    for n in (40, 16):
        with pytest.raises(ValueError, match=f"--n {n} must be a multiple of 16"):
            Plan(n=n)
    with pytest.raises(ValueError, match="4096 samples against 64 real"):
        evaluate(run, x, Plan(n=4096))


def test_reconstructions_are_what_the_first_stage_makes_of_pictures(base, real):
    x = pictures([p.path for p in scan(real, 64).pictures[:3]], 64)
    with torch.no_grad():
        expected = base.autoencoder.decode(base.autoencoder.encode(x / 127.5 - 1)).clamp(-1, 1)
    torch.testing.assert_close(
        reconstruct(base, x, batch=2).float(), (expected + 1) * 127.5, atol=0.6, rtol=0
    )


def test_kind_and_colour_are_told_apart():
    def answering(*names):
        return torch.eye(len(CLASSES))[[CLASSES.index(name) for name in names]]

    truth = torch.tensor([CLASSES.index("red rosette")] * 4)
    found = right_answers(
        answering("red rosette", "blue rosette", "red dahlia", "white daisy"), truth
    )
    assert found == {"right kind": 0.5, "right colour": 0.5, "right kind and colour": 0.25}


def test_a_network_gets_its_pictures_on_its_own_device(monkeypatch):
    asked = []

    def network(x):
        asked.append(x.device.type)
        return torch.zeros(len(x), 2), torch.zeros(len(x), 3)

    features, logits = judged(
        network, torch.zeros(5, 3, 8, 8, dtype=torch.uint8), batch=3, device="meta"
    )
    assert asked == ["meta", "meta"] and features.shape == (5, 2) and logits.shape == (5, 3)
    monkeypatch.setattr(module, "inspect", lambda path: (SimpleNamespace(parts=("inception",)), {}))
    monkeypatch.setattr(module, "inception", lambda state: torch.empty(0).device.type)
    assert module.load_inception("inception.pth", torch.device("meta")) == "meta"


def test_text_figures_are_those_of_the_captions(run, real, judge):
    figures = text_figures(run, scan(real, 64).pictures, judge, each=1, steps=2)
    assert figures["samples"] == 43 and figures["chance"] == 1 / 43
    assert figures["R-precision of real by CLIP"] > 0.5  # it has read such captions
    assert figures["R-precision of real by the judge"] > 0.1
    assert figures["R-precision of samples by CLIP"] < 0.5  # two steps of training


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_the_command_prints_and_saves_the_table(run_folder, real, capsys, monkeypatch):
    monkeypatch.setattr(module, "train_judge", lambda folder: (Judge().eval(), 0.5))
    main(
        [
            "--run",
            str(run_folder),
            "--real",
            str(real),
            "--n",
            "32",
            "--steps",
            "2",
            "--rates",
            "0",
            "0.5",
        ]
    )
    said = capsys.readouterr().out
    rows = json.loads((run_folder / "evaluation.json").read_text())["rows"]
    assert len(rows) == 6 and said.count("held out") == 2 and "50.0% of real flowers" in said
    assert (
        said.count("warning") == 1 and "real pictures are training pictures" in said
    )  # it is the training folder
    for argv in ([], ["--run", "x"], ["--run", "nowhere", "--real", "y"]):
        one_line(main, argv, capsys)
    monkeypatch.setattr(module, "train_judge", None)  # nothing slow before what is wrong is said
    asked = ["--run", run_folder, "--real", real]
    assert "64 pictures, --n 80" in one_line(main, [*asked, "--n", "80"], capsys)
    for mistake in (["--steps", "30"], ["--seed", "-1"], ["--n", "40"], ["--rates", "2"]):
        assert mistake[0] in one_line(main, [*asked, *mistake], capsys) or mistake[0] == "--steps"


@pytest.mark.filterwarnings("ignore:.*samples of 128 features")
def test_ctrl_c_keeps_the_finished_rows(run_folder, real, monkeypatch, capsys):
    painted = []

    def interrupted(*args, **options):
        painted.append(args)
        if len(painted) == 2:
            raise KeyboardInterrupt
        return sample(*args, **options)

    monkeypatch.setattr(module, "sample", interrupted)
    monkeypatch.setattr(module, "train_judge", lambda folder: (None, None))
    argv = ["--run", run_folder, "--real", real, "--n", "32", "--steps", "2"]
    said = one_line(main, argv, capsys, code=130)
    assert "stopped: rows finished: 1, in" in said and "evaluation.json" in said
    kept = json.loads((run_folder / "evaluation.json").read_text())["rows"]
    assert [row["conditions"] for row in kept] == ["training"]


def test_the_command_draws_its_real_pictures_from_all_classes(
    run_folder, real, tmp_path, monkeypatch
):
    """They are listed class by class: the first 32, or the next, would be of one class, and no
    floor for the other."""
    for i, picture in enumerate(scan(real, 64).pictures):
        (tmp_path / "ab"[i // 32]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i // 32] / picture.path.name).write_bytes(picture.path.read_bytes())
    seen = []
    monkeypatch.setattr(
        module, "pictures", lambda paths, size: seen.extend(paths) or torch.zeros(64, 3, 64, 64)
    )
    monkeypatch.setattr(module, "rows_of_figures", lambda run, real, *rest: iter([{}]))
    main(["--run", str(run_folder), "--real", str(tmp_path), "--n", "32"])
    for part in seen[:32], seen[32:]:
        assert len(part) == 32 and 6 < sum(path.parent.name == "a" for path in part) < 26
    assert len(set(seen)) == 64


@pytest.mark.filterwarnings("ignore:.*samples of (128|64) features")
def test_the_command_adds_fid_and_inception_score_given_their_weights(
    run_folder, real, tmp_path, capsys, monkeypatch
):
    """Mean colours in place of Inception's features: those of 32 real pictures and 32 others are
    computed here, too."""
    shapes = {"Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1), "fc.weight": (1008, 2048)}
    torch.save(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "inception.pth"
    )
    given, look_at = [], lambda x: (x.mean((2, 3)), 9 * x.mean((2, 3)))
    monkeypatch.setattr(module, "inception", lambda state: given.append(state) or look_at)
    monkeypatch.setattr(module, "train_judge", lambda folder: (Judge().eval(), 0.5))
    inception = tmp_path / "inception.pth"
    main(flags(run=run_folder, real=real, n=32, steps=2, inception=inception))
    *rows, reconstructions, floor = json.loads((run_folder / "evaluation.json").read_text())["rows"]
    assert {name: tuple(x.shape) for name, x in given[0].items()} == shapes
    paths = [picture.path for picture in scan(real, 64).pictures]
    order = torch.randperm(64, generator=generator(0, 0))
    features, logits = look_at(pictures([paths[i] for i in order], 64) / 127.5 - 1)
    assert floor["FID"] == pytest.approx(frechet_distance(features[32:], features[:32]), rel=1e-4)
    shuffled = logits[32:][torch.randperm(32, generator=generator(0, 0))]
    assert (floor["IS"], floor["IS deviation"]) == pytest.approx(
        inception_score(shuffled), rel=1e-4
    )
    assert all(row["FID"] > floor["FID"] for row in rows) and reconstructions["FID"] > 0
    wrong = ["--run", run_folder, "--real", real, "--n", "32", "--inception", EMBEDDED / "clip.pt"]
    capsys.readouterr()
    assert "not FID's Inception" in one_line(main, wrong, capsys)
