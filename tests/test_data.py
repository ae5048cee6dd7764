"""data.py against closed forms: what pixels become, where a crop lies, what a folder means."""
import hashlib
import io
import json
import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from tinyanl import data
from tinyanl.data import describe, file_identity, open_rgb, read_metadata, scan, to_square

UNREADABLE = {"empty.png": b"", "text.png": b"not a picture",
              "html.jpg": b"<html>quota exceeded</html>"}


def save(path: Path, size=(8, 8), color=None, **options) -> Path:
    """A picture of one colour, which its path decides: no two are alike."""
    color = color or tuple(hashlib.sha256(str(path).encode()).digest()[:3])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **options)
    return path


def noise(size=(64, 64)) -> Image.Image:
    g = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (size[0] * size[1] * 3,), generator=g)
    return Image.frombytes("RGB", size, bytes(values.tolist()))


def pixels(path: Path) -> list[tuple[int, int, int]]:
    picture = open_rgb(path)
    assert picture.mode == "RGB"
    values = picture.tobytes()
    return list(zip(values[0::3], values[1::3], values[2::3], strict=True))


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
    picture = Image.frombytes("I;16", (2, 1), bytes([0, 0, 0xFF, 0xFF]))
    picture.save(tmp_path / "a.png", transparency=0x1234)
    assert pixels(tmp_path / "a.png") == [(0,) * 3, (255,) * 3]


def test_grey_and_1_bit_repeat_their_value(tmp_path):
    Image.frombytes("L", (3, 1), bytes([0, 77, 255])).save(tmp_path / "grey.png")
    Image.frombytes("1", (3, 1), bytes([0b01000000])).save(tmp_path / "bit.png")
    Image.frombytes("1", (3, 1), bytes([0b01000000])).save(tmp_path / "bit.pbm")
    assert pixels(tmp_path / "grey.png") == [(0,) * 3, (77,) * 3, (255,) * 3]
    for name in ("bit.png", "bit.pbm"):
        assert pixels(tmp_path / name) == [(0,) * 3, (255,) * 3, (0,) * 3]


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
    picture = Image.frombytes("RGB", (2, 1), bytes([1, 2, 3, 4, 5, 6]))
    picture.save(tmp_path / "key.png", transparency=(1, 2, 3))
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
    corners = {"red": (0, 0, 16, 16), "blue": (32, 0, 48, 16), "lime": (0, 16, 16, 32)}
    for color, box in corners.items():
        upright.paste(color, box)
    # EXIF says where row 0 and column 0 of the stored picture belong: this is how each is stored
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
    x = torch.tensor(list(picture.tobytes())).view(picture.height, picture.width, 3)       # H W 3
    return x.movedim(2, 0)                                                                 # 3 H W


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
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 400 pixels: a warning, 601: an error
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
    columns = bytes([0, 255] * (256 * 128))  # each one pixel wide
    stripes = Image.frombytes("L", (256, 256), columns).convert("RGB")
    # the mean of black and white; picking pixels would give -1 or 1
    assert to_square(stripes, 32)[:, :, 2:-2].abs().max() < 0.02


# --- colour profiles

def icc(space: str, tags: dict[str, bytes], pcs="XYZ ", kind="mntr") -> bytes:
    """A colour profile (ICC.1:2001): a header of 128 bytes, a table of tags, their values."""
    d50 = struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    common = {"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
              "wtpt": b"XYZ " + bytes(4) + d50, "cprt": b"text" + bytes(4) + b"none\0"}
    table, data = b"", b""
    start = 128 + 4 + 12 * len({**common, **tags})
    for name, value in {**common, **tags}.items():
        table += name.encode() + struct.pack(">2I", start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = start + len(data)
    header = struct.pack(">I4sI", size, b"", 0x02400000) + f"{kind}{space:4}{pcs}".encode()
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + d50
    return header.ljust(128, b"\0") + struct.pack(">I", len(table) // 12) + table + data


def xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


SRGB_CURVE = b"para" + struct.pack(">IHH", 0, 3, 0) + struct.pack(
    ">5i", *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
SRGB = [(0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)]
P3 = [(0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)]


def rgb_profile(primaries) -> bytes:
    """Red, green and blue as XYZ under D50, and sRGB's curve, which Display P3 has too."""
    columns = {f"{name}XYZ": xyz(*column) for name, column in zip("rgb", primaries, strict=True)}
    return icc("RGB", {**columns, **dict.fromkeys(("rTRC", "gTRC", "bTRC"), SRGB_CURVE)})


def to_linear(v: torch.Tensor) -> torch.Tensor:
    return torch.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def from_linear(v: torch.Tensor) -> torch.Tensor:
    v = v.clamp(0, 1)
    return torch.where(v <= 0.0031308, v * 12.92, 1.055 * v ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "tif"])
def test_display_p3_becomes_the_srgb_that_is_meant(tmp_path, extension):
    picture = Image.new("RGB", (32, 32), (180, 90, 60))
    options = {"quality": 100} if extension in ("jpg", "webp") else {}
    picture.save(tmp_path / f"a.{extension}", icc_profile=rgb_profile(P3), **options)
    v = torch.tensor([180, 90, 60], dtype=torch.float64) / 255
    to_xyz, from_xyz = torch.tensor(P3).double().T, torch.tensor(SRGB).double().T.inverse()
    expected = from_linear(from_xyz @ to_xyz @ to_linear(v)) * 255
    difference = torch.tensor(pixels(tmp_path / f"a.{extension}")) - expected
    assert (expected - v * 255).abs().max() > 10, "or nothing would be tried here"
    assert difference.abs().max() <= (3 if extension in ("jpg", "webp") else 1.5)  # they round


@pytest.mark.parametrize("profile", [
    rgb_profile(SRGB), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_profile_that_is_srgb_changes_no_bit(tmp_path, profile, mode):
    picture = noise().convert(mode)
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "tagged.png", icc_profile=profile)
    assert open_rgb(tmp_path / "tagged.png").info["notes"] == []
    assert pixels(tmp_path / "tagged.png") == pixels(tmp_path / "plain.png")


def test_grey_is_read_by_the_curve_of_its_profile(tmp_path):
    linear = icc("GRAY", {"kTRC": gamma(1)})
    ramp = Image.frombytes("L", (16, 16), bytes(range(256)))
    ramp.save(tmp_path / "8.png", icc_profile=linear)
    deep = b"".join((257 * v).to_bytes(2, "little") for v in range(256))
    Image.frombytes("I;16", (16, 16), deep).save(tmp_path / "16.png", icc_profile=linear)
    expected = from_linear(torch.arange(256) / 255)[:, None] * 255
    for name in ("8.png", "16.png"):
        assert (torch.tensor(pixels(tmp_path / name)) - expected).abs().max() <= 1


def test_press_colours_are_read_by_their_profile(tmp_path):
    """A table of 2 x 2 x 2 x 2 corners in CIELAB: no ink is white, the coloured ones L* = 50."""
    white, grey, black = (bytes([lightness, 128, 128]) for lightness in (255, 128, 0))
    corners = white + black + (grey + black) * 7  # the last ink, black, varies fastest
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table = (b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + corners
             + identity * 3)
    profile = icc("CMYK", {"A2B0": table}, pcs="Lab ", kind="prtr")
    for extension in ("tif", "jpg"):
        for inks, grey in (((0, 0, 0, 0), 255), ((255, 0, 0, 0), 119), ((0, 0, 0, 255), 0)):
            path = tmp_path / f"a.{extension}"
            Image.new("CMYK", (16, 16), inks).save(path, icc_profile=profile)
            assert (torch.tensor(pixels(path)) - grey).abs().max() <= 3, (inks, extension)


def test_the_profile_comes_before_transparency_which_it_leaves_alone(tmp_path):
    linear = icc("GRAY", {"kTRC": gamma(1)})
    Image.new("LA", (4, 4), (55, 51)).save(tmp_path / "grey.png", icc_profile=linear)
    light = from_linear(torch.tensor(55 / 255)).item() * 255
    assert abs(pixels(tmp_path / "grey.png")[0][0] - (light / 5 + 255 * 4 / 5)) <= 1
    Image.new("RGBA", (4, 4), (180, 90, 60, 51)).save(
        tmp_path / "p3.png", icc_profile=rgb_profile(P3))
    Image.new("RGB", (4, 4), (180, 90, 60)).save(tmp_path / "o.png", icc_profile=rgb_profile(P3))
    cut_out = open_rgb(tmp_path / "p3.png", keep_alpha=True)
    assert cut_out.getpixel((0, 0)) == (*pixels(tmp_path / "o.png")[0], 51)


@pytest.mark.parametrize("mode, profile", [
    ("RGB", b"junk"), ("RGB", rgb_profile(P3)[:200]), ("RGB", icc("GRAY", {"kTRC": gamma(1)})),
    ("CMYK", rgb_profile(P3)), ("RGB", icc("RGB", {}))])
def test_a_broken_profile_and_one_of_other_colours_are_remarked(tmp_path, mode, profile):
    picture = Image.new(mode, (16, 16), "red")
    picture.save(tmp_path / "plain.tif")
    picture.save(tmp_path / "tagged.tif", icc_profile=profile)
    assert pixels(tmp_path / "tagged.tif") == pixels(tmp_path / "plain.tif")
    assert "profile is broken" in open_rgb(tmp_path / "tagged.tif").info["notes"][0]
    folder = scan(tmp_path, 8)
    assert any(note.startswith("tagged.tif: its colour profile") for note in folder.notes)
    assert scan(tmp_path / "tagged.tif", 8).notes[0].startswith("tagged.tif: its colour profile")


def test_a_profile_that_was_cut_off_is_remarked(tmp_path):
    """Pillow drops it: a chunk whose data cannot be unpacked, and the second of two parts."""
    save(tmp_path / "a.png", icc_profile=rgb_profile(P3))
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"iCCP")
    length = int.from_bytes(content[start - 4:start], "big")
    chunk = (b"iCCPICC Profile\0\0junk").ljust(4 + length, b"\0")
    (tmp_path / "a.png").write_bytes(content[:start] + chunk + struct.pack(">I", zlib.crc32(chunk))
                                     + content[start + 8 + length:])
    save(tmp_path / "b.jpg", icc_profile=rgb_profile(P3))
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content.replace(b"ICC_PROFILE\0\1\1", b"ICC_PROFILE\0\1\2"))
    for name in ("a.png", "b.jpg"):
        assert "profile is broken" in open_rgb(tmp_path / name).info["notes"][0]


def test_broken_exif_costs_no_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3
    broken = exif.tobytes().replace(b"Exif\0\0", b"Exif\0\0?", 1)
    for extension in ("png", "jpg", "webp"):
        save(tmp_path / f"a.{extension}", exif=broken)
        assert open_rgb(tmp_path / f"a.{extension}").size == (8, 8)
    assert "EXIF is broken" in open_rgb(tmp_path / "a.png").info["notes"][0]


def test_a_camera_that_marks_adobe_rgb_without_a_profile_is_remarked(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    save(tmp_path / "a.jpg", exif=exif)
    assert "Adobe RGB" in open_rgb(tmp_path / "a.jpg").info["notes"][0]


@pytest.mark.parametrize("gamma, said", [(1.0, "gamma of 1,"), (1 / 1.8, "gamma of 1.8,"),
                                         (0.45455, None)])
def test_a_png_made_for_another_gamma_is_remarked(tmp_path, gamma, said):
    info = PngImagePlugin.PngInfo()
    info.add(b"gAMA", struct.pack(">I", round(gamma * 100_000)))
    save(tmp_path / "a.png", pnginfo=info)
    notes = open_rgb(tmp_path / "a.png").info["notes"]
    assert said in notes[0] if said else not notes


# --- what TIFF and others hold besides

def tiff(path: Path, size: tuple[int, int], data: bytes, tags: dict[int, int | list[int]]) -> Path:
    """A TIFF of one strip, little-endian, with exactly these tags."""
    width, height = size
    tags = {256: width, 257: height, 259: 1, 278: height, 279: len(data), **tags}
    start = 8 + len(data) + len(data) % 2
    entries, extra = [], b""
    after = start + 2 + 12 * (len(tags) + 1) + 4
    for tag, value in sorted({**tags, 273: 8}.items()):
        values = value if isinstance(value, list) else [value]
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            extra, packed = extra + packed, struct.pack("<I", after + len(extra))
        entries.append(struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0"))
    folder = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0") + folder
                     + extra)
    return path


GREY, FOUR = {262: 1, 277: 1}, {262: 2, 277: 4, 258: [8, 8, 8, 8]}


def test_16_bit_tiff_in_which_zero_is_white_is_no_negative(tmp_path):
    data = b"".join(v.to_bytes(2, "little") for v in (0, 257 * 100, 65535))
    path = tiff(tmp_path / "a.tif", (3, 1), data, {**GREY, 262: 0, 258: 16})
    assert pixels(path) == [(255,) * 3, (155,) * 3, (0,) * 3]


def test_12_bits_that_tiff_declares_are_taken_for_what_they_are(tmp_path):
    data = bytes.fromhex("000 fff 800 000".replace(" ", ""))  # two values in three bytes
    path = tiff(tmp_path / "a.tif", (4, 1), data, {**GREY, 258: 12})
    assert pixels(path) == [(0,) * 3, (255,) * 3, (128,) * 3, (0,) * 3]
    assert open_rgb(path).info["notes"] == []


@pytest.mark.parametrize("name, tags, data", [
    ("32 bits", {258: 32}, bytes([255, 0, 0, 0] * 4)),
    ("signed 16 bits", {258: 16, 339: 2}, bytes(8)),
    ("signed 32 bits", {258: 32, 339: 2}, bytes(16))])
def test_integers_of_unknown_range_are_refused_as_floats_are(tmp_path, name, tags, data):
    path = tiff(tmp_path / "a.tif", (4, 1), data, {**GREY, **tags})
    with pytest.raises(ValueError, match="a.tif: .*have no agreed range"):
        open_rgb(path)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_in_16_are_remarked(tmp_path, bits):
    ramp = b"".join(v.to_bytes(2, "little") for v in (0, 2 ** bits - 1))
    for name in ("a.png", "a.tif"):
        Image.frombytes("I;16", (2, 1), ramp).save(tmp_path / name)
        remark, = open_rgb(tmp_path / name).info["notes"]
        assert f"only {bits} of 16 bits" in remark and str(2 ** (16 - bits)) in remark
    colours = b"".join(v.to_bytes(2, "little") for v in (0, 2 ** bits - 1, 5))
    path = tiff(tmp_path / "b.tif", (1, 1), colours, {262: 2, 277: 3, 258: [16, 16, 16]})
    assert bits == 8 or f"only {bits} of 16 bits" in open_rgb(path).info["notes"][0]


def test_a_fourth_band_is_transparency_only_where_the_file_says_so(tmp_path):
    values = bytes([200, 100, 50, 51])
    infrared = tiff(tmp_path / "infrared.tif", (1, 1), values, FOUR)
    unspecified = tiff(tmp_path / "unspecified.tif", (1, 1), values, {**FOUR, 338: 0})
    declared = tiff(tmp_path / "declared.tif", (1, 1), values, {**FOUR, 338: 2})
    assert pixels(infrared) == pixels(unspecified) == [(200, 100, 50)]
    assert pixels(declared) == [(244, 224, 214)]
    assert "near infrared" in open_rgb(infrared).info["notes"][0]
    assert open_rgb(infrared, keep_alpha=True).getpixel((0, 0)) == (200, 100, 50, 255)
    for mode in ("RGBA", "LA"):  # as Pillow writes them
        Image.new(mode, (8, 8), (9, 51) if mode == "LA" else (9, 9, 9, 51)).save(tmp_path / "p.tif")
        assert set(pixels(tmp_path / "p.tif")) == {(206,) * 3}


def test_jpeg_2000_says_what_its_fourth_band_is_too(tmp_path):
    Image.new("RGBA", (32, 32), (0, 0, 200, 0)).save(tmp_path / "a.jp2", irreversible=False)
    assert set(pixels(tmp_path / "a.jp2")) == {(255, 255, 255)}
    content = (tmp_path / "a.jp2").read_bytes()
    (tmp_path / "b.jp2").write_bytes(content.replace(b"cdef", b"free"))
    assert set(pixels(tmp_path / "b.jp2")) == {(0, 0, 200)}
    assert "near infrared" in open_rgb(tmp_path / "b.jp2").info["notes"][0]


def test_pictures_that_are_wholly_transparent_are_named(tmp_path):
    for i in range(6):
        Image.new("RGBA", (8, 8), (i, 200, 0, 0)).save(tmp_path / f"{i}.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 1)).save(tmp_path / "hardly.png")
    notes = scan(tmp_path, 8).notes
    assert len(notes) == 1 and "wholly transparent" in notes[0]
    assert notes[0].startswith("0.png, 1.png, 2.png and 3 more: ")


def test_the_middle_of_a_strip_is_remarked(tmp_path):
    save(tmp_path / "a.png", (200, 10))
    assert "only the middle" in open_rgb(tmp_path / "a.png").info["notes"][0]


# --- folders

def test_a_flat_folder_is_read_at_any_depth_and_in_any_case_sorted_and_the_same_twice(tmp_path):
    for name in ["b.JPG", "a.Png", "sub/deep/c.WebP", "z.TIFF", "10.bmp", "9.jpeg"]:
        save(tmp_path / name)
    (tmp_path / "readme.txt").write_text("not a picture and not missed")
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == [
        "10.bmp", "9.jpeg", "a.Png", "b.JPG", "sub/deep/c.WebP", "z.TIFF"]
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
    as_on_windows = b"\xef\xbb\xbf" + lines.encode() + b"\r\n\n"
    (tmp_path / "metadata.jsonl").write_bytes(as_on_windows)
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == ["dog/c.png", "cat/b.png", "dog/c.png"]
    assert [(p.text, p.label) for p in folder.pictures] == [
        ("un chien, été\u2028", 1), (None, 0), (None, 1)]
    left_out = ["a.png", *(f"dog/{i}.png" for i in range(5))]
    assert folder.skipped == [(tmp_path / name, "not named in metadata.jsonl") for name in left_out]
    assert describe(folder).startswith(
        "3 pictures in 2 classes, 1 with text, 6 skipped: a.png (not named")


@pytest.mark.parametrize("line", [
    "{", "[1]", "7", "null", '{"text": "x"}', '{"file": 3}', '{"file": null}',
    '{"file": "a.png", "text": 5}', b'{"file": "\xff"}',
])
def test_a_bad_metadata_line_is_an_error_with_file_and_line(tmp_path, line):
    save(tmp_path / "a.png")
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file": "a.png"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r'metadata\.jsonl:3: .*"file": "a.jpg"'):
        scan(tmp_path, 8)


def test_hidden_files_and_macos_leftovers_are_passed_over_in_silence(tmp_path):
    root = tmp_path / ".cache" / "set"  # a hidden folder above the root does not count
    save(root / "a.png")
    for name in ["._a.png", ".hidden.png", "__MACOSX/a.png", "__MACOSX/._a.png", ".git/b.png",
                 ".DS_Store"]:
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
    assert text == (f"1 picture, 7 skipped: {names} and 2 more; "
                    "1 smaller than the model's size, enlarged")


def test_enlarged_counts_the_shorter_side_of_upright_pictures(tmp_path):
    sizes = {"a.png": (31, 90), "b.png": (90, 31), "c.png": (32, 32), "d.png": (33, 200)}
    for name, size in sizes.items():
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
    for part in [str(tmp_path), "2 .txt", "1 .mp4", "1 extension-less", "1 skipped: a.jpg (empty",
                 "Put png"]:
        assert part in str(error.value)


def test_an_empty_folder_a_missing_one_and_a_file_that_is_no_picture_are_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="no readable picture in .*: it holds 0 pictures"):
        scan(tmp_path, 8)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        scan(tmp_path / "nowhere", 8)
    (tmp_path / "notes.txt").write_text("words")
    with pytest.raises(ValueError, match="notes.txt: empty, or not a picture"):
        scan(tmp_path / "notes.txt", 8)


def test_paths_relative_to_the_working_folder_have_no_common_folder(tmp_path, monkeypatch):
    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "1.png")
    (tmp_path / "b" / "2.png").touch()
    monkeypatch.chdir(tmp_path)
    text = describe(scan(".", 8))
    assert text.startswith(f"2 pictures in 2 classes, 1 skipped: {Path('b', '2.png')} (")


def test_one_picture_file_can_stand_for_a_folder(tmp_path):
    path = save(tmp_path / "a.png", (20, 10))
    folder = scan(path, 16)
    assert folder[:4] == ([(path, None, None)], [], [], 1)
    assert scan(path, 10).enlarged == 0 and describe(scan(path, 10)) == "1 picture"


# --- what is a picture

def test_pictures_under_other_extensions_and_under_none_are_read(tmp_path):
    jpeg, png = encoded("jpeg"), encoded("png")
    names = {"a.jpe": jpeg, "b.jpg_large": jpeg, "c.jpg:large": jpeg, "d.mpo": jpeg, "e.apng": png,
             "f.pjpeg": jpeg, "g.jfi": jpeg, "5f1c0a93": png, "h.0a93": jpeg, "i.jxl": jpeg,
             "j.tga": encoded("tga"), "k.ico": encoded("ico"), "l.dib": encoded("dib"),
             "m.gif_": encoded("gif"), "n.webp?w=64": encoded("webp"), "o.j2k": encoded("jpeg2000")}
    for name, content in names.items():
        (tmp_path / name).write_bytes(content + name.encode())  # no two are alike
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == sorted(names) and not folder.notes and not folder.skipped


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise((16, 16)).save(buffer, kind)
    return buffer.getvalue()


def test_what_is_passed_over_is_always_counted(tmp_path):
    for name in ["1.png", "2.png", "3.png", "4.png", "5.png"]:
        save(tmp_path / name)
    for name in [*(f"{i}.md" for i in range(8)), "a.jxl", "b.JXL", "c.jxl", "LICENSE", "d.MOV"]:
        (tmp_path / name).write_text("no picture")
    for name in ["copy.png.bak", "copy.png~", "half.jpg.part", "film.thm"]:
        (tmp_path / name).write_bytes(encoded("png"))
    folder = scan(tmp_path, 8)
    assert len(folder.pictures) == 5 and describe(folder) == "5 pictures"
    assert folder.notes == ["passed over: 8 .md, 3 .jxl, 1 extension-less, 1 .bak, 1 .png~, "
                            "1 .mov, 1 .thm, 1 .part"]


def test_films_and_measurements_that_pillow_opens_are_no_pictures(tmp_path):
    save(tmp_path / "a.png")
    for name in ["a.pdf", "a.eps", "a.mpg", "a.h5", "a.fits"]:
        (tmp_path / name).write_bytes(b"%!PS")
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == ["a.png"] and folder.skipped == []
    assert folder.notes[-1] == "passed over: 1 .eps, 1 .fits, 1 .h5, 1 .mpg, 1 .pdf"


@pytest.mark.parametrize("name, content, reason", [
    ("a.heic", bytes(4) + b"ftypheic" + bytes(50), "pip install pillow-heif"),
    ("phone.jpg", bytes(4) + b"ftypmif1" + bytes(50), "pip install pillow-heif"),
    ("a.png", b"\xff\x0a" + bytes(50), "JPEG XL"),
    ("a.jpg", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
    ("a.tif", b"II*\0" + bytes(60), "bands or bits"),
    ("a.gif", b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "git lfs pull"),
])
def test_what_pillow_cannot_read_is_skipped_with_its_remedy(
        tmp_path, monkeypatch, name, content, reason):
    monkeypatch.setattr(data, "has_heif", lambda: False)
    (tmp_path / name).write_bytes(content)
    save(tmp_path / "ok.png")
    (path, said), = scan(tmp_path, 8).skipped
    assert path.name == name and reason in said


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch):
    """A stand-in for the package, which registers a reader of its own as the real one does."""
    opened = []

    def open_heif(file, name):
        file.close()
        return Image.open(io.BytesIO(encoded("png")))

    def register_heif_opener():
        opened.append(True)
        Image.register_open("HEIF", open_heif, lambda prefix: prefix[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif",
                        SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    data.has_heif.cache_clear()
    try:
        (tmp_path / "a.HEIC").write_bytes(bytes(4) + b"ftypheic" + bytes(50))
        assert open_rgb(tmp_path / "a.HEIC").size == (16, 16) and opened == [True]
    finally:
        data.has_heif.cache_clear()


@pytest.mark.parametrize("name", ["a.zip", "set.tar.gz", "A.ZIP", "a.7z", "a.rar"])
def test_an_archive_is_to_be_unpacked_first(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="is an archive: unzip it first"):
        scan(tmp_path / name, 8)
    with pytest.raises(ValueError, match="Unzip the archive first"):
        scan(tmp_path, 8)


def test_folders_of_systems_and_network_disks_are_no_data(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    for name in names:
        save(tmp_path / name)
    for folder in ["@eaDir/0.png", "#recycle", "$RECYCLE.BIN", "sub/@eaDir", "lost+found",
                   "System Volume Information", ".Trash-1000/files", ".ipynb_checkpoints"]:
        save(tmp_path / folder / "SYNOPHOTO_THUMB_XL.jpg")
    for name in ["Thumbs.db", "desktop.ini", ".DS_Store"]:
        (tmp_path / name).write_bytes(b"junk")
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == names and not folder.notes and not folder.skipped


def test_pictures_that_icloud_has_not_delivered_are_named(tmp_path):
    put(tmp_path, *ROSES)
    (tmp_path / ".IMG_1.jpg.icloud").write_bytes(b"bplist00")
    assert scan(tmp_path, 8).notes == ["not downloaded from iCloud yet, so not used: "
                                       ".IMG_1.jpg.icloud"]


def test_run_folders_of_tinyanl_are_passed_over_and_named(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png")
    for run, marks in {"a": ["adapter.pt"], "runs/b": ["state.pt"], "c": ["config.json"]}.items():
        save(tmp_path / run / "samples" / "step_000500.png")
        for mark in marks:
            (tmp_path / run / mark).touch()
    (tmp_path / "configured").mkdir()
    (tmp_path / "configured" / "config.json").touch()  # no samples/ beside it
    save(tmp_path / "configured" / "x.png")
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == [*(f"{i}.png" for i in range(5)), "configured/x.png"]
    assert folder.notes == ["passed over, as run folders of tinyanl: a, c, runs/b",
                            "passed over: 1 .json"]
    assert len(scan(tmp_path / "a" / "samples", 8).pictures) == 1
    whole = scan(tmp_path / "a", 8)
    assert len(whole.pictures) == 1 and "drawn by a model" in whole.notes[0]


def test_a_model_of_few_pictures_is_warned_of(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png")
    assert scan(tmp_path, 8).notes == ["fewer than 5 pictures: a model trained on so few will "
                                       "repeat them"]
    save(tmp_path / "4.png")
    assert not scan(tmp_path, 8).notes
    assert not scan(tmp_path / "4.png", 8).notes, "one picture is no training set, but a condition"


# --- classes and splits

def put(root: Path, *names: str) -> None:
    for name in names:
        save(root / name)


def in_each(folders: list[str], n=3) -> list[str]:
    return [f"{folder}/{i}.png" for folder in folders for i in range(n)]


@pytest.mark.parametrize("kept", [["test"], ["val", "test"], ["validation"], ["valid", "dev"],
                                  ["Test"]])
@pytest.mark.parametrize("train", ["train", "Training"])
def test_train_is_used_and_what_is_beside_it_is_not(tmp_path, train, kept):
    put(tmp_path, *in_each([f"{train}/cat", f"{train}/dog"]), *in_each([f"{k}/cat" for k in kept]))
    put(tmp_path, "cover.png", *in_each(["extra"], 1))
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "0.md").touch()
    folder = scan(tmp_path, 8)
    assert found(folder, tmp_path) == in_each([f"{train}/cat", f"{train}/dog"])
    assert folder.classes == ["cat", "dog"]
    assert [p.label for p in folder.pictures] == [0] * 3 + [1] * 3
    held = sorted([*(f"{k}/ (3 pictures)" for k in kept), "extra/ (1 picture)", "cover.png"])
    assert folder.notes[0] == f"{train}/ is used; {', '.join(held)} are not trained on"


def test_the_message_about_one_test_folder(tmp_path):
    put(tmp_path, *in_each(["train"], 5), *in_each(["test"], 40))
    assert scan(tmp_path, 8).notes == ["train/ is used; test/ (40 pictures) is not trained on"]
    assert len(scan(tmp_path / "test", 8).pictures) == 40, "named itself, it is simply read"


def test_a_message_about_many_test_folders_is_short(tmp_path):
    put(tmp_path, *in_each([f"{i}/{part}" for i in range(9) for part in ("train", "test")], 1))
    note, = scan(tmp_path, 8).notes
    assert note == ("0/train/, 1/train/, 2/train/ and 6 more is used; 0/test/ (1 picture), "
                    "1/test/ (1 picture), 2/test/ (1 picture) and 6 more are not trained on")


def test_splits_are_found_below_a_wrapping_folder_and_within_each_class(tmp_path):
    put(tmp_path / "a", *in_each(["set/train/cat", "set/train/dog", "set/test/cat"]))
    folder = scan(tmp_path / "a", 8)
    assert folder.classes == ["cat", "dog"] and len(folder.pictures) == 6
    put(tmp_path / "b", *in_each(["bottle/train/good", "bottle/test/broken", "cable/train/good",
                                  "cable/test/cut"]))
    folder = scan(tmp_path / "b", 8)
    assert folder.classes == ["bottle", "cable"] and len(folder.pictures) == 6
    assert folder.notes == ["bottle/train/, cable/train/ is used; bottle/test/ (3 pictures), "
                            "cable/test/ (3 pictures) are not trained on"]


def test_train_alone_holds_the_classes_and_among_other_things_it_is_one(tmp_path):
    put(tmp_path / "a", *in_each(["train/cat", "train/dog"]))
    assert scan(tmp_path / "a", 8).classes == ["cat", "dog"]
    put(tmp_path / "b", *in_each(["bus", "car", "train"]))
    assert scan(tmp_path / "b", 8).classes == ["bus", "car", "train"]


def test_test_beside_classes_is_left_out_but_valid_and_invalid_are_classes(tmp_path):
    put(tmp_path / "a", *in_each(["cat", "dog", "test"]))
    folder = scan(tmp_path / "a", 8)
    assert folder.classes == ["cat", "dog"] and len(folder.pictures) == 6
    assert folder.notes == ["the rest is used; test/ (3 pictures) is not trained on"]
    put(tmp_path / "b", *in_each(["valid", "invalid"]))
    assert scan(tmp_path / "b", 8).classes == ["invalid", "valid"]
    put(tmp_path / "c", *in_each(["val", "test"]))
    folder = scan(tmp_path / "c", 8)
    assert len(folder.pictures) == 6 and folder.classes == []
    assert folder.notes[0].startswith("no classes: test/, val/ are parts of a data set")


def test_a_stray_picture_that_removes_all_classes_is_named(tmp_path):
    put(tmp_path, *in_each(["cat", "dog"]), "cover.jpg")
    folder = scan(tmp_path, 8)
    assert folder.classes == [] and len(folder.pictures) == 7
    assert folder.notes[0].startswith(
        "no classes: cover.jpg is not in one of the folders cat/, dog/ ")


def test_a_folder_of_pictures_beside_one_of_masks_is_no_class(tmp_path):
    put(tmp_path, *in_each(["Images", "masks"]))
    folder = scan(tmp_path, 8)
    assert folder.classes == ["Images", "masks"]
    assert folder.notes == ["the folders Images/, masks/ are taken for classes: if only Images/ "
                            "holds what to train on, name that folder"]


def test_copies_are_named_as_they_can_be_trained_on_and_held_out(tmp_path):
    put(tmp_path, *ROSES)
    for name in ("0 (1).png", "sub/0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((tmp_path / "0.png").read_bytes())
    folder = scan(tmp_path, 8)
    assert len(folder.pictures) == 7
    assert folder.notes == ["0.png, sub/0.png: a copy of another picture, it seems, so one may be "
                            "trained on and the other held out"]


def test_a_folder_around_the_classes_and_a_class_without_a_picture_are_named(tmp_path):
    put(tmp_path / "a", *in_each(["all/cat", "all/dog"]))
    folder = scan(tmp_path / "a", 8)
    assert folder.classes == [] and folder.notes[0] == (
        "no classes: all pictures are in all/. Name that folder to take all/cat/, all/dog/ for "
        "classes")
    put(tmp_path / "b", *in_each(["cat", "dog"]))
    (tmp_path / "b" / "eel").mkdir()
    (tmp_path / "b" / "eel" / "0.png").write_bytes(b"junk")
    (tmp_path / "b" / "stray.png").write_bytes(b"junk")  # not read, so not in the way of classes
    folder = scan(tmp_path / "b", 8)
    assert folder.classes == ["cat", "dog"]
    assert folder.notes == ["no class, as no picture of it can be used: eel/"]


# --- captions

def texts(folder) -> dict[str, str | None]:
    return {picture.path.name: picture.text for picture in folder.pictures}


ROSES = {f"{i}.png": f"rose {i}" for i in range(5)}


def lines(key="file", text="text", rows=ROSES) -> str:
    return "".join(json.dumps({key: file, text: words}) + "\n" for file, words in rows.items())


@pytest.mark.parametrize("key", ["file", "file_name", "File_Name", "filename", "image"])
@pytest.mark.parametrize("text", ["text", "caption", "prompt", "Text", "CAPTION"])
def test_keys_that_others_write_are_read(tmp_path, key, text):
    put(tmp_path, *ROSES)
    (tmp_path / "metadata.jsonl").write_text(lines(key, text))
    folder = scan(tmp_path, 8)
    assert texts(folder) == ROSES and not folder.notes
    row = read_metadata(tmp_path)[1]
    assert (row["file"], row["text"]) == ("1.png", "rose 1")


@pytest.mark.parametrize("content", [
    "file_name,text\n{}", "\ufefffile_name;text\n{}".replace(",", ";"), "Text\tFile_Name\n{}",
    "id,caption,file\n{}", "sep=;\nfile_name;text\n{}", "image_name| id| caption\n{}"])
def test_metadata_csv_is_read(tmp_path, content):
    put(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png")
    header = content.lstrip("\ufeff").removeprefix("sep=;\n").strip("{}\n")
    delimiter = next(sign for sign in ";\t|," if sign in header)
    place = {"file_name": "{file}", "file": "{file}", "image_name": "{file}", "text": "{text}",
             "caption": "{text}", "id": "7"}
    row = delimiter.join(place[column.strip().lower()] for column in header.split(delimiter))
    rows = "".join(row.format(file=f"{name}.png", text=f'"a ""{name}"", or so"') + "\r\n"
                   for name in "abcde")
    (tmp_path / "metadata.csv").write_text(content.format(rows), encoding="utf-8")
    folder = scan(tmp_path, 8)
    assert texts(folder) == {f"{name}.png": f'a "{name}", or so' for name in "abcde"}
    assert not folder.notes
    assert [row["file"] for row in read_metadata(tmp_path)] == [f"{name}.png" for name in "abcde"]


@pytest.mark.parametrize("rows, said", [
    ("a.png,a rose, in a vase\n", r"metadata\.csv:2: more values than columns"),
    ('a.png,"a rose\n', r"metadata\.csv:2: unexpected end"),
    ("a.png,x\nb.png,y\n", r"metadata\.csv:3: 'b.png' is no file in"),
    (b"a.png,r\xf4ti\n", r"metadata\.csv:2: this is no UTF-8"),
])
def test_a_bad_line_of_csv_is_an_error_with_file_and_line(tmp_path, rows, said):
    put(tmp_path, "a.png")
    rows = rows if isinstance(rows, bytes) else rows.encode()
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n" + rows)
    with pytest.raises(ValueError, match=said):
        scan(tmp_path, 8)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "0.txt"])
def test_captions_in_utf_8_and_utf_16(tmp_path, encoding, name):
    put(tmp_path, "0.png")
    content = {"metadata.jsonl": '{"file": "0.png", "text": "crème brûlée 🌹"}\r\n',
               "metadata.csv": "file_name,text\r\n0.png,crème brûlée 🌹\r\n",
               "0.txt": "crème brûlée 🌹\r\n"}[name]
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert texts(scan(tmp_path, 8)) == {"0.png": "crème brûlée 🌹"}


def test_another_encoding_is_named(tmp_path):
    put(tmp_path, *ROSES)
    (tmp_path / "0.txt").write_bytes("crème".encode("latin-1"))
    (tmp_path / "1.txt").write_text("a rose")
    folder = scan(tmp_path, 8)
    assert texts(folder)["0.png"] is None and texts(folder)["1.png"] == "a rose"
    assert folder.notes == ["0.txt: no caption, as it is no UTF-8: save it as UTF-8",
                            "passed over: 1 .txt"]
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file": "0.png", "text": "cr\xe8me"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:1: .* is no UTF-8. Save"):
        scan(tmp_path, 8)


@pytest.mark.parametrize("written", [
    "sub\\caf\u00e9.png", "sub/cafe\u0301.png", "./sub/café.png", "sub/CAFÉ.PNG",
    ".\\sub\\cafe\u0301.png"])
@pytest.mark.parametrize("stored", ["caf\u00e9.png", "cafe\u0301.png"])
def test_names_that_are_spelled_otherwise_are_found(tmp_path, stored, written):
    put(tmp_path, f"sub/{stored}")
    (tmp_path / "metadata.jsonl").write_text(lines(rows={written: "coffee"}), encoding="utf-8")
    folder = scan(tmp_path, 8)
    assert texts(folder) == {stored: "coffee"} and not folder.skipped


@pytest.mark.parametrize("written", ["..\\out.png", "sub\\..\\..\\out.png", "C:\\set\\in.png"])
def test_no_spelling_leads_out_of_the_folder(tmp_path, written):
    put(tmp_path, "out.png", "set/in.png")
    (tmp_path / "set" / "metadata.jsonl").write_text(lines(rows={written: "x"}))
    with pytest.raises(ValueError, match="is no file in"):
        scan(tmp_path / "set", 8)


def test_a_caption_beside_each_picture(tmp_path):
    put(tmp_path, *in_each(["cat", "dog.png"]), "dog.png/cut.png.png", "dog.png/bare.jpg")
    for name, text in {"cat/0.txt": "a cat", "cat/1.TXT": " two\tcats \n\n", "cat/2.caption": "3",
                       "cat/2.txt": "three cats", "dog.png/0.png.txt": "a dog",
                       "dog.png/cut.png.txt": "half a dog", "dog.png/bare.caption": "a bear",
                       "dog.png/1.txt": "   \n", "dog.png/2.txt": "a dog\nin the rain"}.items():
        (tmp_path / name).write_text(text)
    folder = scan(tmp_path, 8)
    assert folder.classes == ["cat", "dog.png"]
    assert [(p.path.relative_to(tmp_path).as_posix(), p.text) for p in folder.pictures] == [
        ("cat/0.png", "a cat"), ("cat/1.png", "two cats"), ("cat/2.png", "three cats"),
        ("dog.png/0.png", "a dog"), ("dog.png/1.png", None), ("dog.png/2.png", "a dog in the rain"),
        ("dog.png/bare.jpg", "a bear"), ("dog.png/cut.png.png", "half a dog")]
    assert folder.notes[:2] == ["dog.png/1.txt: no caption, as it is empty",
                                "dog.png/2.txt: its lines are read as one caption"]
    assert folder.notes[2].startswith("not read: cat/2.caption. Captions come")


def test_boxes_beside_the_pictures_are_no_captions(tmp_path):
    put(tmp_path, *ROSES)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("0 0.5 0.5 0.2 0.3\n2 0.1 0.1 0.01 1e-2\n")
    folder = scan(tmp_path, 8)
    assert set(texts(folder).values()) == {None}
    assert folder.notes == ["0.txt, 1.txt, 2.txt and 2 more: no caption, as it holds numbers only",
                            "passed over: 5 .txt"]


def test_which_captions_win_is_said(tmp_path):
    put(tmp_path, *in_each(["cat", "dog"], 5))
    for folder in ("cat", "dog"):
        (tmp_path / folder / "metadata.jsonl").write_text(lines())
    (tmp_path / "cat" / "metadata.csv").write_text("file_name,text\n0.png,from csv\n")
    (tmp_path / "cat" / "0.txt").write_text("from txt")
    folder = scan(tmp_path, 8)
    assert [p.text for p in folder.pictures] == list(ROSES.values()) * 2
    assert folder.classes == ["cat", "dog"]
    assert folder.notes[:2] == [
        "cat/metadata.csv is not read: cat/metadata.jsonl goes before it",
        "not read, as cat/metadata.jsonl, dog/metadata.jsonl goes before: cat/0.txt"]
    (tmp_path / "metadata.jsonl").write_text(lines(rows={"dog/4.png": "from above"}))
    folder = scan(tmp_path, 8)
    assert texts(folder) == {"4.png": "from above"} and len(folder.skipped) == 9
    assert "dog/metadata.jsonl is not read: metadata.jsonl goes before it" in folder.notes


@pytest.mark.parametrize("above", [True, False])
def test_metadata_of_the_train_folder_and_above_it(tmp_path, above):
    put(tmp_path, *in_each(["train"], 5), *in_each(["test"], 5))
    rows = {f"train/{name}" if above else name: text for name, text in ROSES.items()}
    if above:  # as others write it, with the test pictures in the same file
        rows |= {f"test/{i}.png": "held out" for i in range(5)}
    else:
        (tmp_path / "test" / "metadata.jsonl").write_text(lines(rows=dict.fromkeys(ROSES, "no")))
    place = tmp_path if above else tmp_path / "train"
    (place / "metadata.jsonl").write_text(lines("file_name", rows=rows))
    folder = scan(tmp_path, 8)
    assert texts(folder) == ROSES and folder.skipped == []
    assert folder.notes == ["train/ is used; test/ (5 pictures) is not trained on"]


@pytest.mark.parametrize("name", ["captions.csv", "labels.tsv", "metadata.json", "metadata.json1",
                                  "train.parquet", "captions.txt", "prompts.txt", "0.json"])
def test_what_looks_like_captions_and_is_not_read_is_named(tmp_path, name):
    put(tmp_path, *ROSES)
    (tmp_path / name).write_text("0.png,a rose\n")
    (tmp_path / "README.md").write_text("about the pictures")
    folder = scan(tmp_path, 8)
    assert folder.notes[0] == (f"not read: {name}. Captions come from metadata.jsonl, "
                               "metadata.csv, or a .txt beside each picture")
    assert f"1 {Path(name).suffix}" in folder.notes[1] and "1 .md" in folder.notes[1]


def test_metadata_that_holds_no_caption_says_its_keys(tmp_path):
    put(tmp_path, *ROSES)
    (tmp_path / "metadata.jsonl").write_text(lines("file_name", "title"))
    folder = scan(tmp_path, 8)
    assert set(texts(folder).values()) == {None}
    assert folder.notes == ["no captions: no line of metadata.jsonl has a text or caption or "
                            "prompt or description, only file, file_name, title"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("camera,lens\nx,y\n")
    assert scan(tmp_path, 8).notes == [
        "metadata.csv is not read: none of its columns is file_name (camera, lens)",
        "passed over: 1 .csv"]
    (tmp_path / "metadata.csv").write_text('"camera')
    assert "none of its columns is file_name ()" in scan(tmp_path, 8).notes[0]


def test_two_captions_in_one_line_and_lists_of_captions(tmp_path):
    put(tmp_path, *ROSES)
    rows = [{"file": name, "text": words, "prompt": "not this"} for name, words in ROSES.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = scan(tmp_path, 8)
    assert texts(folder) == ROSES
    assert folder.notes == ["metadata.jsonl: 'prompt' is not read where another key has the text"]
    rows = [{"file": name, "caption": [words, f"one {words}"]} for name, words in ROSES.items()]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = scan(tmp_path, 8)
    assert [p.text for p in folder.pictures[:3]] == ["rose 0", "one rose 0", "rose 1"]
    assert len(folder.pictures) == 10 and len({p.path for p in folder.pictures}) == 5
    assert folder.notes == ["5 different pictures, each as often as it has captions"]


def test_a_picture_is_decoded_once_however_many_captions_it_has(tmp_path, monkeypatch):
    put(tmp_path, *ROSES)
    (tmp_path / "broken.png").write_bytes(b"junk")
    (tmp_path / "metadata.jsonl").write_text(lines() * 3 + lines(rows={"broken.png": "x"}) * 2)
    opened = []
    real = data.open_rgb
    monkeypatch.setattr(data, "open_rgb", lambda path: opened.append(path.name) or real(path))
    folder = scan(tmp_path, 64)
    assert sorted(opened) == sorted([*ROSES, "broken.png"])
    assert (len(folder.pictures), len(folder.skipped), folder.enlarged) == (15, 1, 5)


# --- identity

def test_an_identity_is_the_size_and_a_hash_of_the_first_64_kib(tmp_path):
    beginning = bytes(range(256)) * 256                                            # 65536 bytes
    contents = {"a": beginning + b"x", "b": beginning + b"y", "c": beginning + b"xy",
                "d": b"z" + beginning}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    identity = {name: file_identity(tmp_path / name) for name in contents}
    assert identity["a"] == f"65537 {hashlib.sha256(beginning).hexdigest()[:16]}"
    assert identity["a"] == identity["b"], "only what lies behind the first 64 KiB differs"
    assert len(set(identity.values())) == 3, "another size, and another beginning"
    with pytest.raises(OSError):
        file_identity(tmp_path / "gone")
