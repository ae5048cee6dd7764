"""The sample data set: same pixels for the same seed, captions that tell the truth, files that are
not lost."""
import colorsys
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from commands import one_line
from torchvision.transforms.functional import pil_to_tensor

from tinyanl import flowers
from tinyanl.flowers import BACKGROUNDS, COLOURS, KINDS, draw, main, write


def pixels(picture):
    return pil_to_tensor(picture).float() / 255


def parse(caption):
    """A caption's colour, kind, "on a stem " or None, and background."""
    colours, kinds, backgrounds = ("|".join(words) for words in (COLOURS, KINDS, BACKGROUNDS))
    pattern = f"a ({colours}) ({kinds}) (on a stem )?({backgrounds})"
    return re.fullmatch(pattern, caption).groups()


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
    """Mean absolute difference in 0..1, for each kind; two different flowers differ by 0.15."""
    for seed in range(6):
        other, caption = draw(seed, size)
        assert other.size == (size, size) and parse(caption) == drawn[seed][1:]
        assert (pixels(other.resize((64, 64))) - pixels(drawn[seed][0])).abs().mean() < bound


def test_captions_use_the_vocabulary_all_of_it_and_the_kinds_in_turn(drawn):
    _, colours, kinds, stems, backgrounds = zip(*drawn, strict=True)
    assert set(colours) == set(COLOURS) and set(backgrounds) == set(BACKGROUNDS)
    assert set(stems) == {None, "on a stem "}
    assert kinds == tuple(KINDS) * (len(drawn) // len(KINDS))
    assert all(colour in KINDS[kind] for colour, kind in zip(colours, kinds, strict=True))


def distance(hsv, name):
    """How far a colour is from one of COLOURS; the hue counts where both are saturated."""
    hue, saturation, value = COLOURS[name]
    turn = abs(hsv[0] - hue) % 1
    of_hue = 4 * min(turn, 1 - turn) * min(hsv[1], saturation)
    return of_hue + abs(hsv[1] - saturation) + 0.5 * abs(hsv[2] - value)


def test_petals_have_the_colour_that_the_caption_says(drawn):
    """In flowers with petals around their middle, the median there is nearest to that colour."""
    whole = ("rosette", "dahlia", "five petal flower")
    right = []
    for picture, colour, kind, stem, _ in drawn:
        if kind in whole and not stem:
            middle = pixels(picture)[:, 20:44, 20:44].flatten(1).median(dim=1).values
            hsv = colorsys.rgb_to_hsv(*middle.tolist())
            nearest = min(COLOURS, key=lambda name, hsv=hsv: distance(hsv, name))
            right.append(nearest == colour)
    assert len(right) >= 25 and sum(right) / len(right) >= 0.85


def test_the_background_is_as_dark_or_blue_as_the_caption_says(drawn):
    def corners(words):
        """Mean colours of the upper corners, where no flower reaches: R, G, B of each picture."""
        found = []
        for picture, *_, background in drawn:
            if background == words:
                x = pixels(picture)
                found.append(torch.cat([x[:, :6, :6], x[:, :6, -6:]], dim=2).mean((1, 2)))
        return torch.stack(found)

    assert corners("on a dark background").max() < 0.3
    assert corners("on a plain background").min() > 0.5
    red, green, blue = corners("against the sky").T
    assert (blue > red).all() and (blue >= green).all()
    red, green, blue = corners("with green leaves").T
    assert (green > red).all() and (green > blue).all()


def test_write_makes_pictures_and_captions_and_seeds_share_no_flower(tmp_path):
    for seed in (0, 1):
        write(tmp_path / str(seed), n=7, size=32, seed=seed)
    lines = (tmp_path / "0" / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
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


@pytest.mark.parametrize(
    "arguments, said", [(["--n", "0"], "n=0"), (["--size", "8"], "size=8"), (["--n", "x"], "--n")]
)
def test_mistakes_are_one_line_without_traceback_and_leave_no_folder(
    arguments, said, tmp_path, capsys
):
    assert said in one_line(main, [tmp_path / "flowers", *arguments], capsys)
    assert not (tmp_path / "flowers").exists()


def test_ctrl_c_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    drawn = []

    def interrupted(seed, size):
        drawn.append(seed)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(seed, size)

    monkeypatch.setattr(flowers, "draw", interrupted)
    assert "stopped" in one_line(main, [tmp_path / "flowers", "--size", "16"], capsys, code=130)
    assert not list(tmp_path.iterdir())


def test_command_draws_names_the_next_command_and_refuses_to_draw_again(tmp_path):
    folder = tmp_path / "flowers"
    command = [sys.executable, "-m", "tinyanl.flowers", str(folder), "--n", "3", "--size", "16"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"python -m tinyanl.train --data {folder}" in said
    assert len(list(folder.glob("*.png"))) == 3
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "not empty" in again.stderr


def test_a_reader_that_has_left_ends_the_command_without_a_word(tmp_path):
    command = [sys.executable, "-m", "tinyanl.flowers", str(tmp_path / "x"), "--n", "1"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == 141 and "Error" not in done.stderr
    assert (tmp_path / "x" / "00000.png").exists()
