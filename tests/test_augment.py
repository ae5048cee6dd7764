"""Variations of labelled pictures."""

import json
import signal

import pytest
import torch
from commands import flags, one_line

from tinyanl import augment, flowers, train
from tinyanl.augment import save_part, variations
from tinyanl.data import open_rgb, scan, to_square
from tinyanl.models import load_run
from tinyanl.sample import sample, to_uint8


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    data = tmp_path_factory.mktemp("data") / "flowers"
    flowers.write(data, 12)
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw", lambda *args: None)
        return train.train(data, steps=2, batch=2, out=out, device="cpu")


@pytest.fixture(scope="module")
def run(run_folder):
    return load_run(run_folder, device="cpu")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for i in range(4):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        flowers.draw(i)[0].save(folder / "ab"[i % 2] / f"flower {i}.png")
    return folder


@pytest.mark.parametrize("part", [32, 3])  # in one part, and in two
def test_variations_keep_their_class_and_say_how_far_they_went(
    run, run_folder, labelled, tmp_path, capsys, monkeypatch, part
):
    monkeypatch.setattr(augment, "PART", part)
    out = tmp_path / "more"
    argv = flags(run=run_folder, data=labelled, out=out, per_image=3, steps=2)
    augment.main(argv)
    made = scan(out, 64)
    assert made.classes == ["a", "b"] and len(made.pictures) == 12 and not made.skipped
    rows = json.loads((out / "augment.json").read_text())["pictures"]
    assert {row["file"] for row in rows} == {str(p.path.relative_to(out)) for p in made.pictures}
    for row in rows:
        assert row["file"][0] == row["of"].removeprefix(f"{labelled}/")[0]  # the class folder
    made = torch.stack([to_square(open_rgb(out / row["file"]), 64) for row in rows])
    ours = run.base.clip.embed(made)
    given = run.base.clip.embed(torch.stack([to_square(open_rgb(row["of"]), 64) for row in rows]))
    expected = torch.nn.functional.cosine_similarity(ours, given).tolist()
    assert [row["like it"] for row in rows] == pytest.approx(expected, abs=5e-3)
    names = "like it", "like another class", "like a training picture"
    assert all(-1 <= row[name] <= 1.0001 for row in rows for name in names)
    assert "12 pictures" in capsys.readouterr().out
    assert "not empty" in one_line(augment.main, argv, capsys)
    one_class = flags(run=run_folder, data=labelled / "a", out=tmp_path / "x")
    assert "no classes" in one_line(augment.main, one_class, capsys)
    assert "--mask-rate" in one_line(augment.main, [*argv, "--mask-rate", "2"], capsys)
    seeded = flags(run=run_folder, data=labelled, out=tmp_path / "x", seed=-1)
    assert "--seed" in one_line(augment.main, seeded, capsys)


def test_ctrl_c_keeps_whole_parts_and_their_rows(
    run_folder, labelled, tmp_path, capsys, monkeypatch
):
    painted = []

    def interrupted(*args):
        painted.append(args)
        if len(painted) == 2:
            raise KeyboardInterrupt
        return variations(*args)

    monkeypatch.setattr(augment, "PART", 2)
    monkeypatch.setattr(augment, "variations", interrupted)
    argv = flags(run=run_folder, data=labelled, out=tmp_path, per_image=3, steps=2)
    said = one_line(augment.main, argv, capsys, code=130)
    assert f"stopped: 6 of 12 pictures are in {tmp_path}" in said
    rows = json.loads((tmp_path / "augment.json").read_text())["pictures"]
    assert {row["file"] for row in rows} == {
        str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")
    }
    assert len(rows) == 6 and all(
        {"like it", "like another class", "like a training picture"} < row.keys() for row in rows
    )


def test_a_signal_while_files_are_written_waits_for_them(
    run_folder, labelled, tmp_path, capsys, monkeypatch
):
    def interrupted(x, first, *rest):
        signal.raise_signal(signal.SIGTERM)
        return save_part(x, first, *rest)

    monkeypatch.setattr(augment, "PART", 2)
    monkeypatch.setattr(augment, "save_part", interrupted)
    argv = flags(run=run_folder, data=labelled, out=tmp_path, per_image=1, steps=2)
    assert "stopped: 2 of 4 pictures" in one_line(augment.main, argv, capsys, code=130)


def test_a_variation_is_a_masked_sample_of_its_picture(run, labelled):
    paths = [p.path for p in scan(labelled, 64).pictures]
    x, embeddings = augment.augment(run, paths, per_image=2, mask_rate=0.0, steps=2)
    assert x.shape == (4, 2, 3, 64, 64) and x.dtype == torch.uint8 and embeddings.shape == (4, 128)

    expected = to_uint8(sample(run, run.condition(embeddings).repeat_interleave(2, 0), steps=2))
    assert torch.equal(x.flatten(0, 1), expected)
