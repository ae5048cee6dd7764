"""data.py against closed forms: what each mode's pixels become, where a crop lies, what a folder means."""
import hashlib
import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from tinyanl.data import describe, file_identity, open_rgb, scan, to_square

UNREADABLE = {"empty.png": b"", "text.png": b"not a picture", "html.jpg": b"<html>quota exceeded</html>"}


def save(path: Path, size=(8, 8), color="red", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def noise(size=(64, 64)) -> Image.Image:
    values = torch.randint(0, 256, (size[0] * size[1] * 3,), generator=torch.Generator().manual_seed(0))
    return Image.frombytes("RGB", size, bytes(values.tolist()))


def pixels(path: Path) -> list[tuple[int, int, int]]:
    picture = open_rgb(path)
    assert picture.mode == "RGB"
    return list(zip(*[iter(picture.tobytes())] * 3))


def found(folder, root: Path) -> list[str]:
    return [p.path.relative_to(root).as_posix() for p in folder.pictures]


# --- one picture

@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_every_16_bit_grey_value_is_divided_by_257_and_rounded(tmp_path, extension):
    path = tmp_path / f"ramp.{extension}"
    ramp = b"".join(v.to_bytes(2, "little") for v in range(65536))
    Image.frombytes("I;16", (256, 256), ramp).save(path)
    assert pixels(path) == [(round(v / 257),) * 3 for v in range(65536)]


def test_big_endian_16_bit_tiff_reads_like_little_endian(tmp_path):
    Image.frombytes("I;16B", (2, 1), bytes([0x80, 0x80, 0xFF, 0xFF])).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif") == [(128,) * 3, (255,) * 3]


def test_a_transparent_16_bit_grey_value_does_no_harm(tmp_path):
    Image.frombytes("I;16", (2, 1), bytes([0, 0, 0xFF, 0xFF])).save(tmp_path / "a.png", transparency=0x1234)
    assert pixels(tmp_path / "a.png") == [(0,) * 3, (255,) * 3]


def test_grey_and_1_bit_repeat_their_value(tmp_path):
    Image.frombytes("L", (3, 1), bytes([0, 77, 255])).save(tmp_path / "grey.png")
    Image.frombytes("1", (3, 1), bytes([0b01000000])).save(tmp_path / "bit.png")
    Image.frombytes("1", (3, 1), bytes([0b01000000])).save(tmp_path / "bit.pbm")
    assert pixels(tmp_path / "grey.png") == [(0,) * 3, (77,) * 3, (255,) * 3]
    assert pixels(tmp_path / "bit.png") == pixels(tmp_path / "bit.pbm") == [(0,) * 3, (255,) * 3, (0,) * 3]


def test_rgba_and_la_are_laid_on_white(tmp_path):
    rgba = [9, 8, 7, 0, 9, 8, 7, 255, 100, 0, 200, 51]
    Image.frombytes("RGBA", (3, 1), bytes(rgba)).save(tmp_path / "rgba.png")
    Image.frombytes("LA", (3, 1), bytes([0, 0, 60, 255, 100, 51])).save(tmp_path / "la.png")
    # alpha 51 is 1/5: value / 5 + 255 * 4 / 5
    assert pixels(tmp_path / "rgba.png") == [(255, 255, 255), (9, 8, 7), (224, 204, 244)]
    assert pixels(tmp_path / "la.png") == [(255,) * 3, (60,) * 3, (224,) * 3]


def test_palette_colours_are_looked_up_and_the_transparent_ones_become_white(tmp_path):
    picture = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "index.gif", transparency=1)
    picture.save(tmp_path / "alphas.png", transparency=bytes([255, 0, 51]))
    assert pixels(tmp_path / "plain.png") == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert pixels(tmp_path / "index.gif") == [(255, 0, 0), (255, 255, 255), (0, 0, 255)]
    assert pixels(tmp_path / "alphas.png") == [(255, 0, 0), (255, 255, 255), (204, 204, 255)]


def test_a_colour_key_in_an_rgb_png_becomes_white(tmp_path):
    Image.frombytes("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6])).save(tmp_path / "key.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "key.png") == [(255, 255, 255), (4, 5, 6)]


@pytest.mark.parametrize("extension", ["tif", "jpg"])
def test_cmyk_is_ink_taken_from_white(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 0, 0, 255): (0, 0, 0)}
    for cmyk, rgb in inks.items():
        Image.new("CMYK", (16, 16), cmyk).save(path)
        assert (torch.tensor(pixels(path)) - torch.tensor(rgb)).abs().max() <= 3     # jpeg rounds


@pytest.mark.parametrize("extension", ["png", "jpg", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(tmp_path, orientation, extension):
    upright = Image.new("RGB", (48, 32), "white")
    for box, color in [((0, 0, 16, 16), "red"), ((32, 0, 48, 16), "blue"), ((0, 16, 16, 32), "lime")]:
        upright.paste(color, box)
    # EXIF names where row 0 and column 0 of the stored picture belong; these store the upright one so
    T, exif = Image.Transpose, Image.Exif()
    stored = {1: upright, 2: upright.transpose(T.FLIP_LEFT_RIGHT), 3: upright.rotate(180),
              4: upright.transpose(T.FLIP_TOP_BOTTOM), 5: upright.transpose(T.TRANSPOSE),
              6: upright.rotate(90, expand=True), 7: upright.transpose(T.TRANSVERSE),
              8: upright.rotate(-90, expand=True)}[orientation]
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if extension == "jpg" else {}
    stored.save(tmp_path / f"a.{extension}", exif=exif, **options)
    picture = open_rgb(tmp_path / f"a.{extension}")
    assert picture.size == upright.size
    difference = to_tensor(picture) - to_tensor(upright)
    assert difference.abs().max() <= (4 if extension == "jpg" else 0)


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3).movedim(2, 0)  # 3 H W


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tif"])
def test_an_animation_gives_its_first_frame(tmp_path, extension):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], **options)
    assert set(pixels(tmp_path / f"a.{extension}")) == {(255, 0, 0)}


def test_floating_point_pixels_are_refused_not_turned_black(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="a.tif: floating-point"):
        open_rgb(tmp_path / "a.tif")


def test_a_pillow_warning_stays_inside_and_the_callers_filters_come_back(tmp_path, monkeypatch):
    path = save(tmp_path / "big.png", (20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)                # 400 pixels: a warning, 601: an error
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(path).close()
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert open_rgb(path).size == (20, 20)
    assert not seen and warnings.filters == before


def test_a_right_sized_picture_keeps_every_pixel():
    picture = noise((64, 64))
    x = to_square(picture, 64)
    assert x.shape == (3, 64, 64) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    assert torch.equal(((x + 1) * 127.5).round().long(), to_tensor(picture))
    torch.testing.assert_close(x, to_tensor(picture) / 127.5 - 1)


@pytest.mark.parametrize("size, box", [
    ((24, 8), (8, 0, 16, 8)), ((8, 24), (0, 8, 8, 16)), ((12, 8), (2, 0, 10, 8)),
])
def test_the_crop_is_the_centre_when_the_shorter_side_fits(size, box):
    picture = noise(size)
    torch.testing.assert_close(to_square(picture, 8), to_tensor(picture.crop(box)) / 127.5 - 1)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("side", [4, 128])
def test_resized_pictures_are_cropped_at_the_centre_and_keep_their_aspect(wide, side):
    """A black picture whose centre square is white comes out white, but for the filter's edge."""
    picture = Image.new("L", (3 * side, side), 0)
    picture.paste(255, (side, 0, 2 * side, side))
    picture = picture.convert("RGB") if wide else picture.convert("RGB").rotate(90, expand=True)
    x = to_square(picture, 16)
    assert (x[:, 4:12, 4:12] > 0.9).all() and x.shape == (3, 16, 16)
    if side == 128:  # reduced: only the outermost pixels feel the black around
        assert (x[:, 2:14, 2:14] == 1).all()


def test_reducing_is_antialiased():
    stripes = Image.frombytes("L", (256, 256), bytes([0, 255] * (256 * 128))).convert("RGB")  # 1-pixel columns
    assert to_square(stripes, 32)[:, :, 2:-2].abs().max() < 0.02  # the mean; picking pixels gives -1 or 1


# --- folders

def test_a_flat_folder_is_read_at_any_depth_and_in_any_case_sorted_and_the_same_twice(tmp_path):
    for name in ["b.JPG", "a.Png", "sub/deep/c.WebP", "z.TIFF", "10.bmp", "9.jpeg"]:
        save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("not a picture and not missed")
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == ["10.bmp", "9.jpeg", "a.Png", "b.JPG", "sub/deep/c.WebP", "z.TIFF"]
    assert folder == scan(str(tmp_path), 8)
    assert folder.classes == [] and folder.skipped == []
    assert {(p.text, p.label) for p in folder.pictures} == {(None, None)}


def test_class_folders_give_sorted_classes_and_labels(tmp_path):
    for name in ["dog/1.png", "cat/deep/2.png", "cat/1.png", "eel/1.png", "bee/1.png", "ant/1.png"]:
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    folder = scan(tmp_path, 8)
    assert folder.classes == ["ant", "bee", "cat", "dog", "eel"]
    assert [(p.path.relative_to(tmp_path).as_posix(), p.label) for p in folder.pictures] == [
        ("ant/1.png", 0), ("bee/1.png", 1), ("cat/1.png", 2), ("cat/deep/2.png", 2),
        ("dog/1.png", 3), ("eel/1.png", 4)]
    assert describe(folder) == "6 pictures in 5 classes"


@pytest.mark.parametrize("names", [["a.png", "cat/b.png", "dog/c.png"], ["jpg/a.png", "jpg/b.png"]])
def test_a_mixed_folder_and_a_single_sub_folder_have_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name)
    folder = scan(tmp_path, 8)
    assert folder.classes == [] and [p.label for p in folder.pictures] == [None] * len(names)


def test_metadata_gives_captions_and_order_and_what_it_leaves_out_is_named(tmp_path):
    for name in ["a.png", "cat/b.png", "dog/c.png", *(f"dog/{i}.png" for i in range(5))]:
        save(tmp_path / name)
    rows = [{"file": "dog/c.png", "text": "un chien, été\u2028"}, {"file": "cat/b.png", "stars": 5},
            {"file": "dog/c.png", "text": None}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode() + b"\r\n\n")  # as on Windows
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == ["dog/c.png", "cat/b.png", "dog/c.png"]
    assert [(p.text, p.label) for p in folder.pictures] == [("un chien, été\u2028", 1), (None, 0), (None, 1)]
    unnamed = "not named in metadata.jsonl"
    assert folder.skipped == [(tmp_path / name, unnamed) for name in ("a.png", *(f"dog/{i}.png" for i in range(5)))]
    assert describe(folder).startswith("3 pictures in 2 classes, 1 with text, 6 skipped: a.png (not named")


@pytest.mark.parametrize("line", ["{", "[1]", "7", "null", '{"text": "x"}', '{"file": 3}', '{"file": null}',
                                  '{"file": "a.png", "text": 5}', b'{"file": "\xff"}'])
def test_a_bad_metadata_line_is_an_error_with_file_and_line(tmp_path, line):
    save(tmp_path / "a.png")
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file": "a.png"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r'metadata\.jsonl:3: .*"file": "a.jpg"'):
        scan(tmp_path, 8)


def test_hidden_files_and_macos_leftovers_are_passed_over_in_silence(tmp_path):
    root = tmp_path / ".cache" / "set"  # a hidden folder above the root does not count
    save(root / "a.png")
    for name in ["._a.png", ".hidden.png", "__MACOSX/a.png", "__MACOSX/._a.png", ".git/b.png", ".DS_Store"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"junk")
    folder = scan(root, 8)
    assert found(folder, root) == ["a.png"] and folder.skipped == []


def test_linked_folders_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "set").mkdir()
    try:
        (tmp_path / "set" / "cat").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert found(scan(tmp_path / "set", 8), tmp_path / "set") == ["cat/a.png"]


@pytest.mark.parametrize("extension", ["jpg", "png", "bmp", "gif", "webp"])
def test_a_truncated_picture_is_named_and_skipped(tmp_path, extension):
    buffer = io.BytesIO()
    noise().save(buffer, {"jpg": "jpeg"}.get(extension, extension))
    (tmp_path / f"cut.{extension}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    save(tmp_path / "ok.png")
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == ["ok.png"]
    assert [path for path, _ in folder.skipped] == [tmp_path / f"cut.{extension}"]
    assert extension == "webp" or folder.skipped[0][1] == "truncated"


def test_files_that_are_no_pictures_are_named_and_skipped(tmp_path):
    for name, content in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    save(tmp_path / "ok.png")
    folder = scan(tmp_path, 8)
    assert {path.name for path, _ in folder.skipped} == set(UNREADABLE)
    assert {reason for _, reason in folder.skipped} == {"empty, or not a picture Pillow knows"}
    with pytest.raises(ValueError, match="text.png: empty, or not"):
        open_rgb(tmp_path / "text.png")


def test_a_decompression_bomb_is_named_and_skipped(tmp_path, monkeypatch):
    save(tmp_path / "bomb.png", (40, 40))
    save(tmp_path / "ok.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == ["ok.png"] and "1600 pixels" in folder.skipped[0][1]


def test_description_lists_five_skipped_files_by_their_path_in_the_folder(tmp_path):
    for i in range(7):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{i}.png").touch()
    save(tmp_path / "dog" / "ok.png")
    text = describe(scan(tmp_path, 32))
    reason = "(empty, or not a picture Pillow knows)"
    names = ", ".join(f"{Path('cat', f'{i}.png')} {reason}" for i in range(5))
    assert text == f"1 picture, 7 skipped: {names} and 2 more; 1 smaller than the model's size, enlarged"


def test_enlarged_counts_the_shorter_side_of_upright_pictures(tmp_path):
    for name, size in {"a.png": (31, 90), "b.png": (90, 31), "c.png": (32, 32), "d.png": (33, 200)}.items():
        save(tmp_path / name, size)
    assert scan(tmp_path, 32).enlarged == 2
    assert "; 2 smaller than the model's size" in describe(scan(tmp_path, 32))
    assert describe(scan(tmp_path, 8)) == "4 pictures"


def test_a_folder_without_a_readable_picture_says_what_it_holds(tmp_path):
    for name in ["a.txt", "b.TXT", "c.mp4", "LICENSE"]:
        (tmp_path / name).touch()
    (tmp_path / "a.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError) as error:
        scan(tmp_path, 8)
    for part in [str(tmp_path), "2 .txt", "1 .mp4", "1 extension-less", "1 skipped: a.jpg (empty", "Put png"]:
        assert part in str(error.value)


def test_an_empty_folder_a_missing_one_and_a_file_that_is_no_picture_are_clear_errors(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no readable picture in .*: it holds 0 pictures"):
        scan(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere", 8)
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match="notes.txt: empty, or not a picture"):
        scan(tmp_path / "notes.txt", 8)
    save(tmp_path / "a" / "1.png"), save(tmp_path / "b" / "1.png"), (tmp_path / "b" / "2.png").touch()
    monkeypatch.chdir(tmp_path)  # paths relative to "." have no common folder
    assert describe(scan(".", 8)).startswith(f"2 pictures in 2 classes, 1 skipped: {Path('b', '2.png')} (")


def test_one_picture_file_can_stand_for_a_folder(tmp_path):
    path = save(tmp_path / "a.png", (20, 10))
    folder = scan(path, 16)
    assert folder == ([(path, None, None)], [], [], 1)
    assert scan(path, 10).enlarged == 0 and describe(scan(path, 10)) == "1 picture"


# --- identity

def test_an_identity_is_the_size_and_a_hash_of_the_first_64_kib(tmp_path):
    beginning = bytes(range(256)) * 256                                            # 65536 bytes
    contents = {"a": beginning + b"x", "b": beginning + b"y", "c": beginning + b"xy", "d": b"z" + beginning}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    identity = {name: file_identity(tmp_path / name) for name in contents}
    assert identity["a"] == f"65537 {hashlib.sha256(beginning).hexdigest()[:16]}"
    assert identity["a"] == identity["b"], "only what lies behind the first 64 KiB differs"
    assert len(set(identity.values())) == 3, "another size, and another beginning"
    with pytest.raises(OSError):
        file_identity(tmp_path / "gone")
