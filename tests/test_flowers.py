"""The sample data set: the same pixels for the same seed, captions that tell the truth, files that are not lost."""
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
    match = re.fullmatch(rf"an? ({'|'.join(COLOURS)}) ({'|'.join(KINDS)}) (on a stem )?({'|'.join(BACKGROUNDS)})", caption)
    return match.groups()


def test_the_same_seed_gives_the_same_pixels_and_another_seed_others():
    assert draw(3)[0].tobytes() == draw(3)[0].tobytes()
    assert len({draw(i)[0].tobytes() for i in range(10)}) == 10


def test_pixels_do_not_depend_on_threads_or_on_global_random_state():
    threads = torch.get_num_threads()
    expected = draw(4)[0].tobytes()
    torch.manual_seed(99)
    torch.set_num_threads(1)
    try:
        assert draw(4)[0].tobytes() == expected
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [16, 100, 200])
def test_another_size_is_the_same_flower(size):
    small, caption = draw(1, 64)
    other, same = draw(1, size)
    assert other.size == (size, size) and caption == same
    difference = (pixels(other.resize((64, 64))) - pixels(small)).abs().mean().item()
    stranger = (pixels(draw(2, 64)[0]) - pixels(small)).abs().mean().item()
    assert difference < 0.06 and difference < stranger / 3


def test_captions_use_the_vocabulary_and_all_of_it_appears():
    said = [parse(draw(i, 16)[1]) for i in range(150)]
    assert {kind for _, kind, _, _ in said} == set(KINDS)
    assert {colour for colour, _, _, _ in said} == set(COLOURS)
    assert {words for *_, words in said} == set(BACKGROUNDS)
    assert all(colour in KINDS[kind] for colour, kind, _, _ in said)


def test_petals_have_the_colour_that_the_caption_says():
    """The median colour around the middle of a large flower is nearest, in hue and saturation, to the one named."""
    right = 0
    cases = [(i, parse(draw(i, 16)[1])) for i in range(200)]
    cases = [(i, said[0]) for i, said in cases if said[1] in ("rosette", "dahlia", "five petal flower") and not said[2]][:40]
    for i, colour in cases:
        patch = pixels(draw(i, 64)[0])[:, 22:42, 22:42].flatten(1).median(dim=1).values
        hue, saturation, value = colorsys.rgb_to_hsv(*patch.tolist())

        def distance(name):
            h, s, _ = COLOURS[name]
            turn = abs(h - hue) % 1
            return min(turn, 1 - turn) * min(s, saturation) * 4 + abs(s - saturation)

        right += min(COLOURS, key=distance) == colour
    assert len(cases) == 40 and right >= 32


def test_write_makes_pictures_and_captions_and_seeds_share_no_flower(tmp_path):
    for seed in (0, 1):
        write(tmp_path / str(seed), n=5, size=32, seed=seed)
    rows = [json.loads(line) for line in (tmp_path / "0" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"{i:05d}.png" for i in range(5)]
    assert all(parse(row["text"]) for row in rows)
    written = [path.read_bytes() for path in tmp_path.glob("*/*.png")]
    assert len(written) == len(set(written)) == 10


def test_write_does_not_touch_a_folder_with_files(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        write(tmp_path, n=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("arguments", [["--n", "0"], ["--size", "8"]])
def test_mistakes_are_one_line_without_traceback(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "flowers"), *arguments])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_command_draws_and_names_the_next_command(tmp_path):
    command = [sys.executable, "-m", "tinyanl.flowers", str(tmp_path / "flowers"), "--n", "3", "--size", "16"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "python -m tinyanl.train --data" in said and len(list((tmp_path / "flowers").glob("*.png"))) == 3
