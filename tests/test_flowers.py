"""The sample data set: same pixels for the same seed, captions that tell the truth, files that are not lost."""
import colorsys
import json
import re
import subprocess
import sys

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from tinyanl.flowers import BACKGROUNDS, COLOURS, KINDS, draw, main, write


def pixels(picture):
    return pil_to_tensor(picture).float() / 255


def parse(caption):
    words = "|".join(COLOURS), "|".join(KINDS), "|".join(BACKGROUNDS)
    return re.fullmatch("a ({}) ({}) (on a stem )?({})".format(*words), caption).groups()


@pytest.fixture(scope="module")
def drawn():
    """120 flowers: (picture, colour, kind, stem or None, background)."""
    return [(picture, *parse(caption)) for picture, caption in map(draw, range(120))]


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others(drawn):
    assert all(draw(seed)[0].tobytes() == drawn[seed][0].tobytes() for seed in range(6))
    assert len({picture.tobytes() for picture, *_ in drawn}) == len(drawn)


def test_pixels_do_not_depend_on_threads_or_on_global_random_state():
    threads, drawings = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.manual_seed(n)
            torch.set_num_threads(n)
            before = torch.get_rng_state()
            drawings.append(draw(3, 160)[0].tobytes())  # large enough for torch to share out
            assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)
    assert drawings[0] == drawings[1]


@pytest.mark.parametrize("size, bound", [(16, .06), (100, .015), (128, .004), (256, .01)])
def test_another_size_is_the_same_flower(drawn, size, bound):
    """Mean absolute difference in 0..1, for each kind; two different flowers differ by 0.15 and more."""
    for seed in range(6):
        other, caption = draw(seed, size)
        assert other.size == (size, size) and parse(caption) == drawn[seed][1:]
        assert (pixels(other.resize((64, 64))) - pixels(drawn[seed][0])).abs().mean() < bound


def test_captions_use_the_vocabulary_all_of_it_and_the_kinds_in_turn(drawn):
    _, colours, kinds, stems, backgrounds = zip(*drawn)
    assert set(colours) == set(COLOURS) and set(backgrounds) == set(BACKGROUNDS)
    assert set(stems) == {None, "on a stem "}
    assert kinds == tuple(KINDS) * (len(drawn) // len(KINDS))
    assert all(colour in KINDS[kind] for colour, kind in zip(colours, kinds))


def test_petals_have_the_colour_that_the_caption_says(drawn):
    """In flowers with petals around their middle, the median there is nearest to the named colour in HSV."""
    cases = [(picture, colour) for picture, colour, kind, stem, _ in drawn
             if kind in ("rosette", "dahlia", "five petal flower") and not stem]
    right = 0
    for picture, colour in cases:
        middle = pixels(picture)[:, 20:44, 20:44].flatten(1).median(dim=1).values
        h, s, v = colorsys.rgb_to_hsv(*middle.tolist())

        def distance(name):
            hue, saturation, value = COLOURS[name]
            turn = abs(h - hue) % 1
            return 4 * min(turn, 1 - turn) * min(s, saturation) + abs(s - saturation) + .5 * abs(v - value)

        right += min(COLOURS, key=distance) == colour
    assert len(cases) >= 25 and right / len(cases) >= .85


def test_the_background_is_as_dark_or_blue_as_the_caption_says(drawn):
    def corners(words):  # the upper corners, where no flower reaches
        return torch.stack([torch.cat([p[:, :6, :6], p[:, :6, -6:]], dim=2).mean((1, 2)) for p in
                            (pixels(picture) for picture, *_, said in drawn if said == words)])

    assert corners("on a dark background").max() < .3 and corners("on a plain background").min() > .5
    red, green, blue = corners("against the sky").T
    assert (blue > red).all() and (blue >= green).all()
    red, green, blue = corners("with green leaves").T
    assert (green > red).all() and (green > blue).all()


def test_write_makes_pictures_and_captions_and_seeds_share_no_flower(tmp_path):
    for seed in (0, 1):
        write(tmp_path / str(seed), n=7, size=32, seed=seed)
    rows = [json.loads(line) for line in (tmp_path / "0" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"{i:05d}.png" for i in range(7)]
    assert [parse(row["text"])[1] for row in rows] == [*KINDS, "daisy"]
    written = [path.read_bytes() for path in tmp_path.glob("*/*.png")]
    assert len(written) == len(set(written)) == 14


def test_write_does_not_touch_a_folder_with_files_and_takes_an_empty_one(tmp_path, monkeypatch):
    write(tmp_path, n=1, size=16)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="not empty"):
        write(tmp_path, n=2, size=16, seed=1)
    with pytest.raises(FileExistsError):
        write(tmp_path / "00000.png", n=1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # a folder that is replaced under the user's feet
    with pytest.raises(FileExistsError, match="where you are"):
        write(".", n=1)


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--size", "8"]])
def test_mistakes_are_one_line_without_traceback_and_leave_no_folder(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "flowers"), *arguments])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "flowers").exists()


def test_command_draws_names_the_next_command_and_refuses_to_draw_again(tmp_path):
    folder = tmp_path / "flowers"
    command = [sys.executable, "-m", "tinyanl.flowers", str(folder), "--n", "3", "--size", "16"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"python -m tinyanl.train --data {folder}" in said and len(list(folder.glob("*.png"))) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not empty" in again.stderr
