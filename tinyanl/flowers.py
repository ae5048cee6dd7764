"""Draws the sample data set, flowers with captions: `python -m tinyanl.flowers ./flowers --n 200`.

Whatever is in focus is made of one shape, the petal (seeds, stems and leaves, too), painted back to
front on a canvas (4 S S), premultiplied RGBA in 0..1. With u from the petal's base 0 to its tip 1
and v across it from -1 to 1, a point is inside where f > 0:

    f = g (1 - point + point |g|) - (1 - base^2) s^2 - v^2,    g = 1 - t^2,
    t = max(u - widest, 0) / (1 - widest),    s = min(u - widest, 0) / widest

One light shades it by its normal (Lambert). Seeds and the petals of rosettes and dahlias sit at the
golden angle (Vogel 1979). Points of a picture are complex numbers, x + iy in pixels, y down. Pixels
see + - * / and sqrt only, which round alike on any number of threads: same seed, same bytes.

Copy this file alone: it needs torch, torchvision, pillow and tqdm, nothing else of tinyanl. Usage:

    from flowers import draw
    picture, caption = draw(seed=5, size=64)
    print(picture.size, caption)
"""
import argparse
import colorsys
import json
import math
import os
import random
import shutil
import sys
from cmath import phase, rect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

GOLDEN = math.pi * (3 - math.sqrt(5))  # radians
LIGHT = (-0.52, -0.60, 0.61)  # unit vector to the light: left, up, out of the picture
SMALLEST, LARGEST = 16, 4096  # pixels, sides of a picture

Hsv = tuple[float, float, float]  # hue, saturation, value, in 0..1
Tones = list[tuple[int, ...]]  # RGB bytes of a surface in shadow, plain, and in full light


@dataclass(frozen=True)
class Look:
    """The outline of a petal (see the header) and how it is shaded."""

    base: float = 0.4  # width at the base
    point: float = 0  # 0: a round tip, 1: a pointed one
    widest: float = 0.6  # where, from base 0 to tip 1
    notch: float = 0  # how deep the tip is cut in
    bend: float = 0  # of the middle to one side, in lengths
    slope: tuple[float, float] = (-0.2, 0.4)  # how steeply it falls at the base and at the tip
    curl: float = 0.5  # how steeply it falls at the sides
    crease: float = 0  # along the middle
    deep: float = 0.6  # how dark it is at the base
    rim: float = 0  # how light at the edge
    veins: float = 0
    shadow: float = 0.5  # that it casts on what lies below


class Form(NamedTuple):
    """How a kind of flower is built."""

    petals: tuple[int, int]  # fewest and most in a row
    rows: tuple[float, ...]  # relative lengths of the petals of each row
    ratio: float  # half width / length of a petal
    disc: float  # radius of the disc in the middle / that of the flower
    seeds: int  # of the disc
    look: Look


class Scene(NamedTuple):
    """What lies behind a flower: a gradient, blurred blobs, blurred leaves."""

    top: tuple[float | None, float, float]  # as Hsv; no hue: any but the flower's
    bottom: tuple[float | None, float, float]
    blobs: int = 0
    blob_colour: Hsv = (0, 0, 1)
    blob_alpha: float = 0
    blob_size: float = 0.05  # in picture sides, as the next
    blob_blur: float = 0.006
    blob_height: float = 1  # of its width
    leaves: int = 0
    brightness: float = 0  # of leaves
    is_meadow: bool = False  # leaves are blades of grass, and blobs lie low


COLOURS: dict[str, Hsv] = {
    "red": (0.985, 0.84, 0.86),
    "orange": (0.07, 0.86, 0.97),
    "yellow": (0.135, 0.82, 0.98),
    "white": (0.12, 0.05, 0.97),
    "pink": (0.93, 0.44, 0.97),
    "magenta": (0.87, 0.74, 0.86),
    "purple": (0.765, 0.6, 0.76),
    "blue": (0.62, 0.64, 0.89),
}
BACKGROUNDS = {
    "with green leaves": Scene(
        top=(0.3, 0.6, 0.36),
        bottom=(0.33, 0.65, 0.2),
        blobs=12,
        blob_colour=(0.25, 0.45, 0.85),
        blob_alpha=0.35,
        leaves=8,
        brightness=0.6,
    ),
    "in a meadow": Scene(
        top=(0.56, 0.38, 0.92),
        bottom=(0.28, 0.6, 0.4),
        blobs=16,
        blob_colour=(0.15, 0.3, 1),
        blob_alpha=0.5,
        blob_size=0.04,
        leaves=13,
        brightness=0.7,
        is_meadow=True,
    ),
    "against the sky": Scene(
        top=(0.59, 0.58, 0.88),
        bottom=(0.56, 0.16, 0.97),
        blobs=6,
        blob_alpha=0.9,
        blob_size=0.2,
        blob_blur=0.035,
        blob_height=0.35,
    ),
    "on a plain background": Scene(top=(None, 0.15, 0.98), bottom=(None, 0.24, 0.84)),
    "on a dark background": Scene(
        top=(None, 0.3, 0.16),
        bottom=(None, 0.3, 0.05),
        blobs=9,
        blob_colour=(0.6, 0.3, 0.5),
        blob_alpha=0.3,
        leaves=3,
        brightness=0.2,
    ),
}
FORMS = {
    "daisy": Form(
        petals=(14, 18),
        rows=(1, 0.74),
        ratio=0.084,
        disc=0.29,
        seeds=60,
        look=Look(widest=0.74, base=0.45, curl=0.8, crease=-0.12, shadow=0.8),
    ),
    "rosette": Form(
        petals=(21, 24),
        rows=(1,),
        ratio=0.62,
        disc=0,
        seeds=0,
        look=Look(base=0.6, point=0.2, curl=-0.3, slope=(-1, 0.1), deep=2.5, rim=0.7),
    ),
    "five petal flower": Form(
        petals=(5, 5),
        rows=(1,),
        ratio=0.52,
        disc=0.15,
        seeds=24,
        look=Look(widest=0.7, base=0.2, notch=0.14, deep=1, veins=0.35),
    ),
    "star flower": Form(
        petals=(5, 7),
        rows=(1,),
        ratio=0.2,
        disc=0.13,
        seeds=14,
        look=Look(widest=0.42, point=1, curl=0.3, crease=0.45),
    ),
    "sunflower": Form(
        petals=(15, 19),
        rows=(1, 0.88),
        ratio=0.15,
        disc=0.41,
        seeds=120,
        look=Look(base=0.5, point=0.95, crease=0.15),
    ),
    "dahlia": Form(
        petals=(62, 72),
        rows=(1,),
        ratio=0.3,
        disc=0,
        seeds=0,
        look=Look(base=0.6, point=1, curl=-0.7, slope=(-0.4, 0.3), rim=0.5, shadow=0.9),
    ),
}
KINDS = {kind: tuple(COLOURS) for kind in FORMS}  # kind -> names of the colours it has
KINDS["sunflower"] = ("yellow", "orange", "red")

DOME = Look(widest=0.5, base=0, slope=(-1, 1), curl=1, deep=0)  # a seed, and the disc below them
LEAF = Look(widest=0.4, point=1, crease=0.25)  # behind the flower
STALK = Look(base=0.9, deep=0, curl=0.9)
STALK_LEAF = Look(widest=0.42, base=0.2, point=0.9, crease=0.35)


def tones(hue: float, saturation: float, value: float) -> Tones:
    """RGB bytes of a surface of this colour (the hue wraps): in shadow, plain and in full light."""
    shades = [
        (hue - 0.02, min(saturation * 1.2 + 0.07, 1), value * 0.52),
        (hue, saturation, value),
        (hue, saturation * 0.5, value * 0.5 + 0.5),
    ]
    found = []
    for h, s, v in shades:
        rgb = colorsys.hsv_to_rgb(h % 1, s, v)
        found.append(tuple(round(255 * min(channel, 1)) for channel in rgb))
    return found


def outline(u: Tensor, v: Tensor, look: Look) -> Tensor:
    """f of the header: above 0 inside of the petal."""
    u = u + look.notch * (1 - 5 * v * v).clamp(min=0)
    t = (u - look.widest).clamp(min=0) / (1 - look.widest)
    s = (u - look.widest).clamp(max=0) / look.widest
    g = 1 - t * t
    tip = g * (g.abs() * look.point + (1 - look.point))
    return tip - s * s * (1 - look.base * look.base) - v * v


def brightness(u: Tensor, v: Tensor, du: float, dv: float, look: Look) -> Tensor:
    """Lambert's law, 1 for a surface that faces the viewer. du, dv: away from the light."""
    along = look.slope[0] + (look.slope[1] - look.slope[0]) * u
    across = v * look.curl + (v * 6).clamp(-1, 1) * look.crease
    length = (1 + along * along + across * across).sqrt()  # of the normal
    return (LIGHT[2] - along * du - across * dv) / length / LIGHT[2]


def surface(u: Tensor, v: Tensor, f: Tensor, light: Tensor, tone: Tensor, look: Look) -> Tensor:
    """RGB (3 h w) of a petal: darker towards its base, along veins and where it is turned from the
    light; lighter where it is turned to it and at the edge. tone: 3 3 1 1."""
    dark, plain, lit = tone
    heart = (1 - u).clamp(0, 1)
    ray = v / (u.clamp(min=0) + 0.35) * 4
    vein = (1 - (ray - ray.round()).abs() * 4).clamp(min=0) * look.veins
    shade = (heart * (heart * look.deep + vein) + (1 - light) * 0.75).clamp(0, 1)
    colour = plain + (dark - plain) * shade
    shine = ((light - 1) * 0.8 + (1 - f * 4).clamp(min=0) * look.rim).clamp(0, 0.8)
    return colour + (lit - colour) * shine


def inside(edge: float, side: int) -> int:
    """A coordinate in whole pixels, moved into the canvas."""
    return min(max(int(edge), 0), side)


def petal(
    canvas: Tensor,
    at: complex,
    angle: float,
    length: float,
    width: float,
    tone: Tones,
    look: Look,
) -> None:
    """Paints a petal on canvas (4 S S), in place, and its shadow on what is there.

    at: its base; angle: where it points to, radians; length and half width in pixels."""
    way = rect(1, angle)
    cos, sin = way.real, way.imag
    drop = min(length * 0.09, width * 0.3)  # how far its shadow falls

    # the part of the canvas that it covers
    middle = at + rect(length * 0.48, angle)
    long = length * 0.56
    wide = width + length * abs(look.bend) / 4
    reach = complex(abs(cos) * long + abs(sin) * wide, abs(sin) * long + abs(cos) * wide)
    reach += (drop + 2) * (1 + 1j)
    side = canvas.shape[-1]
    left, right = inside((middle - reach).real, side), inside((middle + reach).real, side)
    top, bottom = inside((middle - reach).imag, side), inside((middle + reach).imag, side)
    under = canvas[:, top:bottom, left:right]  # 4 h w

    # its own coordinates there, and those of the petal that its shadow has the shape of
    x = torch.arange(left, right) + (0.5 - at.real)  # w
    y = torch.arange(top, bottom)[:, None] + (0.5 - at.imag)  # h 1
    u = x * (cos / length) + y * (sin / length)  # h w
    bend = u * (1 - u) * (look.bend * length / width)
    v = y * (cos / width) - x * (sin / width) - bend  # h w
    du = -LIGHT[0] * cos - LIGHT[1] * sin  # away from the light
    dv = LIGHT[0] * sin - LIGHT[1] * cos
    both_u = torch.stack([u, u - du * drop / length])  # 2 h w
    both_v = torch.stack([v, v - dv * drop / width])
    f, f_shadow = outline(both_u, both_v, look)

    tone = torch.tensor(tone)[..., None, None] / 255  # 3 3 1 1
    dark, plain, _ = tone
    darkest = (1 - dark / plain.clamp(min=0.02)).clamp(min=0.15)
    under[:3] *= 1 - look.shadow * (f_shadow + 0.4).clamp(0, 1) * darkest

    # f / edge is the distance to the edge across the petal, which keeps a pointed tip sharp
    edge = (f + v * v).clamp(min=0).sqrt() + v.abs()
    softness = edge * look.point + 1.8 * (1 - look.point) + 1e-3
    cover = (f * width / softness + 0.5).clamp(0, 1)  # h w
    light = brightness(u, v, du, dv, look)
    colour = surface(u, v, f, light, tone, look)  # 3 h w
    under *= 1 - cover
    under += torch.cat([colour, torch.ones_like(cover)[None]]) * cover


def layer(canvas: Tensor, blur: float = 0.0) -> Image.Image:
    """Premultiplied canvas (4 S S) -> RGBA picture, out of focus by `blur` picture sides."""
    colour = canvas[:3] / canvas[3:].clamp(min=1 / 255)
    rgba = torch.cat([colour, canvas[3:]]).clamp(0, 1)
    picture = to_pil_image((rgba * 255 + 0.5).byte())
    return picture.filter(ImageFilter.GaussianBlur(blur * canvas.shape[-1]))


class Place(NamedTuple):
    """Where a petal of a flower grows: `start` from the middle, and its size, all in radii."""

    start: float
    angle: float
    length: float
    ratio: float  # half width / length


def place_petal(kind: str, k: int, n: int, turn: float, rng: random.Random) -> Place:
    """The k-th petal of n in a row, the outermost first. turn: that of the whole flower."""
    form = FORMS[kind]
    ratio = form.ratio * rng.uniform(0.95, 1.05)
    r = max(1 - k / n, 0) ** 0.5
    spiral = turn - k * GOLDEN
    if kind == "rosette":
        return Place(0, spiral, r**1.7, ratio * (1.4 - 0.4 * r * r))
    if kind == "dahlia":
        return Place(max(0.7 * r - 0.22, 0), spiral, min(0.22 + 0.3 * r, 0.1 + r), ratio)
    row = k // n
    circle = 2 * math.pi * (k + row / 2 + rng.uniform(-0.1, 0.1)) / n  # rows are half a petal apart
    return Place(0, turn + circle, form.rows[row], ratio)


def paint_disc(
    canvas: Tensor, middle: complex, kind: str, radius: float, rng: random.Random
) -> None:
    """Paints the disc of a flower with its seeds, the outermost first."""
    form = FORMS[kind]
    hue, saturation, value = (0.07, 0.72, 0.52) if kind == "sunflower" else (0.115, 0.82, 1)
    disc = form.disc * radius * rng.uniform(0.9, 1.1)
    if form.seeds:
        dark = tones(hue, saturation, value * 0.5)
        petal(canvas, middle - disc, 0, 2 * disc, disc, dark, DOME)
    for k in range(form.seeds, 0, -1):
        r = math.sqrt(k / form.seeds)
        size = 0.9 * disc / math.sqrt(form.seeds)
        angle = k * GOLDEN
        darker = value * rng.uniform(0.75, 0.95) * (0.75 + 0.35 * r * r)  # towards the middle
        tone = tones(hue + 0.03 * r, saturation, darker)
        at = middle + rect(disc * r * 0.95 - size, angle)
        petal(canvas, at, angle, 2 * size, size, tone, DOME)


def flower(kind: str, colour: str, rng: random.Random, side: int, radius: float) -> Image.Image:
    """A flower of KINDS and COLOURS from the front, in the middle of a transparent picture
    (side x side)."""
    canvas = torch.zeros(4, side, side)
    middle = (side + side * 1j) / 2
    form = FORMS[kind]
    turn = rng.uniform(0, 2 * math.pi)
    hue, saturation, value = COLOURS[colour]
    hue += rng.uniform(-0.015, 0.015)
    saturation *= rng.uniform(0.9, 1.06)
    value *= rng.uniform(0.95, 1.03)
    tone = tones(hue, saturation, value)
    n = rng.randint(*form.petals)
    for k in range(n * len(form.rows)):  # what is nearer the middle lies above
        place = place_petal(kind, k, n, turn, rng)
        length = place.length * (radius * rng.uniform(0.94, 1.03))
        at = middle + rect(place.start * radius, place.angle)
        petal(canvas, at, place.angle, length, length * place.ratio, tone, form.look)
    paint_disc(canvas, middle, kind, radius, rng)
    return layer(canvas)


def paint_leaf(canvas: Tensor, scene: Scene, rng: random.Random) -> None:
    """Paints a leaf of the background, or a blade of grass, which grows from below."""
    side = canvas.shape[-1]
    x = rng.uniform(-0.05, 1.05)
    y = rng.uniform(0.95 if scene.is_meadow else -0.05, 1.05)
    length = rng.uniform(0.25, 0.5) * side
    angle = rng.uniform(-2, -1.1) if scene.is_meadow else rng.uniform(0, 6.3)
    hue, saturation = rng.uniform(0.25, 0.36), rng.uniform(0.5, 0.75)
    green = tones(hue, saturation, scene.brightness * rng.uniform(0.5, 1))
    look = replace(LEAF, bend=rng.uniform(-0.3, 0.3))
    width = length * (0.06 if scene.is_meadow else 0.25)
    petal(canvas, side * complex(x, y), angle, length, width, green, look)


def background(words: str, rng: random.Random, side: int, hue: float) -> Image.Image:
    """What lies behind a flower of this hue, out of focus: RGB (side x side). words: of
    BACKGROUNDS."""
    scene = BACKGROUNDS[words]
    another_hue = hue + rng.uniform(0.15, 0.85)
    ends = []
    for h, s, v in (scene.top, scene.bottom):
        h = another_hue if h is None else h + rng.uniform(-0.025, 0.025)
        ends.append(tones(h, s, v)[1])
    gradient = Image.linear_gradient("L").resize((side, side))
    picture = ImageOps.colorize(gradient, *ends)

    mask = Image.new("L", (side, side))
    for _ in range(scene.blobs):
        x = rng.random() * side
        y = rng.uniform(0.5 if scene.is_meadow else 0, 1) * side
        r = scene.blob_size * rng.uniform(0.3, 1) * side
        box = (x - r, y - r * scene.blob_height, x + r, y + r * scene.blob_height)
        fill = round(255 * scene.blob_alpha * rng.uniform(0.5, 1))
        ImageDraw.Draw(mask).ellipse(box, fill=fill)
    mask = mask.filter(ImageFilter.GaussianBlur(scene.blob_blur * side))
    picture.paste(tones(*scene.blob_colour)[1], (0, 0), mask)

    if scene.leaves:
        near = rng.uniform(0.006, 0.018)
        for blur in (0.03, near):
            canvas = torch.zeros(4, side, side)
            for _ in range(scene.leaves):
                paint_leaf(canvas, scene, rng)
            leaves = layer(canvas, blur)
            picture.paste(leaves, (0, 0), leaves)
    return picture


def stalk(top: complex, side: int, rng: random.Random) -> Image.Image:
    """A stalk from below the picture to `top`, with one or two leaves: RGBA (side x side)."""
    canvas = torch.zeros(4, side, side)
    foot = complex(top.real + rng.uniform(-0.13, 0.13) * side, 1.05 * side)
    green = tones(rng.uniform(0.26, 0.35), 0.66, rng.uniform(0.4, 0.6))
    bend = rng.gauss(0, 0.12)
    up = top - foot
    look = replace(STALK, bend=bend)
    petal(canvas, foot, phase(up), abs(up), 0.017 * side, green, look)
    for turn in rng.sample([-1, 1], rng.choice([1, 2, 2])):  # to the left, to the right
        u = rng.uniform(0.2, 0.42)
        length = rng.uniform(0.22, 0.33) * side
        angle = phase(up) + turn * rng.uniform(0.6, 1.15)
        at = foot + up * u * (1 + (1 - u) * bend * 1j)
        look = replace(STALK_LEAF, bend=turn * 0.2)
        petal(canvas, at, angle, length, length * 0.24, green, look)
    return layer(canvas)


def draw(seed: int, size: int = 64) -> tuple[Image.Image, str]:
    """The flower of a seed, RGB (size x size), and its caption. A larger size is the same flower,
    finer; consecutive seeds go round KINDS. ValueError below 16 pixels."""
    if size < SMALLEST:
        raise ValueError(
            f"size={size} is too small for a flower: use {SMALLEST} or more, 64 for the embedded "
            "weights"
        )
    rng = random.Random(f"flower {seed}")
    side = max(256, 2 * size)  # drawn larger than wanted
    kind = list(KINDS)[seed % len(KINDS)]
    colour = rng.choice(KINDS[kind])
    words = rng.choice(list(BACKGROUNDS))
    has_stalk = rng.random() < 0.5
    picture = background(words, rng, side, COLOURS[colour][0])
    x = 0.5 + rng.uniform(-0.07, 0.07)
    y = (0.39 if has_stalk else 0.5) + rng.uniform(-0.05, 0.05)
    middle = side * complex(x, y)
    if has_stalk:
        green = stalk(middle, side, rng)
        picture.paste(green, (0, 0), green)
    radius = side * (rng.uniform(0.27, 0.34) if has_stalk else rng.uniform(0.34, 0.45))
    front = flower(kind, colour, rng, side, radius)
    aslant = (round(side * rng.uniform(0.8, 1)), round(side * rng.uniform(0.8, 1)))
    front = front.resize(aslant, Image.Resampling.BICUBIC)
    left = round(middle.real - front.width / 2)
    top = round(middle.imag - front.height / 2)
    alpha = front.getchannel("A").filter(ImageFilter.GaussianBlur(0.025 * side))
    shadow = alpha.point(lambda alpha: alpha * 0.4)
    picture.paste((0, 0, 0), (left + round(0.02 * side), top + round(0.03 * side)), shadow)
    picture.paste(front, (left, top), front)
    if rng.random() < 0.5:  # light from the right
        picture = ImageOps.mirror(picture)
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    stem = "on a stem " if has_stalk else ""
    return picture, f"a {colour} {kind} {stem}{words}"


def check_new(folder: Path) -> None:
    """FileExistsError: this folder cannot be made, or is not empty."""
    if folder.resolve() == Path.cwd():
        raise FileExistsError(f"{folder} is where you are: choose a new name")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is no folder: choose a new name")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: choose a new name")


def save(folder: Path, pictures: Iterable[tuple[Image.Image, dict]], n: int) -> None:
    """Save pictures, of which there are n, and their rows of metadata.jsonl. The folder is there
    whole or not at all. FileExistsError if it is not empty."""
    check_new(folder)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        lines = []
        for i, (picture, row) in enumerate(tqdm(pictures, "drawing", total=n, unit="picture")):
            name = f"{i:05d}.png"
            picture.save(part / name)
            lines.append(json.dumps({"file": name, **row}) + "\n")
        (part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # what was not renamed


def write(folder: str | Path, n: int = 200, size: int = 64, seed: int = 0) -> None:
    """Writes n flowers, 00000.png and on, and metadata.jsonl, {"file", "text", "tags", "subgroup"}
    a line. Different seeds share no flower. ValueError for too small or large an n or size,
    FileExistsError if the folder is not empty."""
    if n < 1:
        raise ValueError(f"n={n}: ask for at least 1 flower")
    if not SMALLEST <= size <= LARGEST:
        raise ValueError(f"size={size}: ask for {SMALLEST} to {LARGEST} pixels")

    def flowers() -> Iterator[tuple[Image.Image, dict]]:
        for i in range(n):
            number = random.Random(f"{seed}/{i}").getrandbits(40)
            picture, text = draw(number * len(KINDS) + i, size)  # so that the kinds take turns
            tags = [word for word in (*COLOURS, *KINDS) if f" {word} " in f"{text} "]
            row = {"text": text, "tags": [*tags, "flower"], "subgroup": "plant-flower"}
            yield picture, row

    save(Path(folder), flowers(), n)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> None:
    p = OneLineParser(
        prog="python -m tinyanl.flowers",
        description="Draws flowers with captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("folder", type=Path, help="new or empty folder for pictures and metadata.jsonl")
    p.add_argument("--n", type=int, default=200, help="number of flowers")
    p.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    p.add_argument("--seed", type=int, default=0, help="sets of different seeds share no flower")
    args = p.parse_args(argv)
    try:
        write(args.folder, args.n, args.size, args.seed)
        print(f"{args.n} flowers are in {args.folder}")
        print(f"next: python -m tinyanl.train --data {args.folder}", flush=True)
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor what is left of it
        p.exit(141)
    except (ValueError, OSError) as error:
        p.error(str(error))
    except KeyboardInterrupt:
        p.exit(130, f"{p.prog}: stopped: nothing was kept\n")


if __name__ == "__main__":
    torch.set_num_threads(1)  # petals are small: threads would only wait for each other
    main()
