"""Draws the sample data set, flowers with captions: `python -m tinyanl.flowers ./flowers --n 200`.

All in focus is one shape, the petal (seeds, stems, leaves too), painted back to front on a canvas (4 S S),
premultiplied RGBA in 0..1. With u from its base 0 to its tip 1, v across from -1 to 1, it is where f > 0:

    f = g (1 - point + point |g|) - (1 - base^2) s^2 - v^2,    g = 1 - t^2,
    t = max(u - widest, 0) / (1 - widest),    s = min(u - widest, 0) / widest

One light shades it by its normal (Lambert). Seeds and rose and dahlia petals sit at the golden angle (Vogel
1979). Pixels see + - * / and sqrt only, which round alike on any number of threads: same seed, same bytes.

Copy this file alone: it needs torch, torchvision, pillow and tqdm, nothing else of tinyanl. Usage:

    from flowers import draw
    picture, caption = draw(seed=5, size=64)
    print(picture.size, caption)
"""
import argparse
import colorsys
import json
import math
import random
import shutil
from cmath import phase, rect
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

GOLDEN = math.pi * (3 - math.sqrt(5))
LIGHT = (-.52, -.60, .61)  # unit vector to the light: left, up, out of the picture
COLOURS = {  # hue, saturation, value
    "red": (.985, .84, .86), "orange": (.07, .86, .97), "yellow": (.135, .82, .98), "white": (.12, .05, .97),
    "pink": (.93, .44, .97), "magenta": (.87, .74, .86), "purple": (.765, .6, .76), "blue": (.62, .64, .89)}
BACKGROUNDS = {  # top, bottom (hue None: not the flower's); blobs; number and brightness of leaves, 1: grass
    "with green leaves": ((.3, .6, .36), (.33, .65, .2), (12, (.25, .45, .85), .35, .05, .006, 1), (8, .6, 0)),
    "in a meadow": ((.56, .38, .92), (.28, .6, .4), (16, (.15, .3, 1), .5, .04, .006, 1), (13, .7, 1)),
    "against the sky": ((.59, .58, .88), (.56, .16, .97), (6, (0, 0, 1), .9, .2, .035, .35), (0, 0, 0)),
    "on a plain background": ((None, .15, .98), (None, .24, .84), (0, (0, 0, 1), 0, 0, 0, 1), (0, 0, 0)),
    "on a dark background": ((None, .3, .16), (None, .3, .05), (9, (.6, .3, .5), .3, .05, .006, 1), (3, .2, 0))}
FORMS = {  # petals a row, lengths of rows, half width / length, radius of disc, its seeds, look of a petal
    "daisy": ((14, 18), (1, .74), .084, .29, 60, dict(widest=.74, base=.45, curl=.8, crease=-.12, shadow=.8)),
    "rosette": ((21, 24), (1,), .62, 0, 0, dict(base=.6, point=.2, curl=-.3, slope=(-1, .1), deep=2.5, rim=.7)),
    "five petal flower": ((5, 5), (1,), .52, .15, 24, dict(widest=.7, base=.2, notch=.14, deep=1, veins=.35)),
    "star flower": ((5, 7), (1,), .2, .13, 14, dict(widest=.42, point=1, curl=.3, crease=.45)),
    "sunflower": ((15, 19), (1, .88), .15, .41, 120, dict(base=.5, point=.95, crease=.15)),
    "dahlia": ((62, 72), (1,), .3, 0, 0, dict(base=.6, point=1, curl=-.7, slope=(-.4, .3), rim=.5, shadow=.9))}
KINDS = {kind: ("yellow", "orange", "red") if kind == "sunflower" else tuple(COLOURS) for kind in FORMS}


def tones(h: float, s: float, v: float) -> list[tuple[int, ...]]:
    """RGB bytes of a surface of this hue (wraps), saturation and value: in shadow, plain and in full light."""
    shades = (h - .02, min(s * 1.2 + .07, 1), v * .52), (h, s, v), (h, s * .5, v * .5 + .5)
    return [tuple(round(255 * min(c, 1)) for c in colorsys.hsv_to_rgb(h % 1, s, v)) for h, s, v in shades]


def petal(canvas: Tensor, at: complex, angle: float, length: float, width: float, tone: list, base=.4, point=0,
          widest=.6, notch=0, bend=0, slope=(-.2, .4), curl=.5, crease=0, deep=.6, rim=0, veins=0, shadow=.5):
    """Paints a petal on canvas (4 S S), in place. at: its base, x + iy; length and half width in pixels too.
    slope, curl: fall at base and tip, at the sides; deep, rim: how dark the base is, how light the edge."""
    way, middle, drop = rect(1, angle), at + rect(length * .48, angle), min(length * .09, width * .3)
    cos, sin, long, wide = way.real, way.imag, length * .56, width + length * abs(bend) / 4
    half = complex(abs(cos) * long + abs(sin) * wide, abs(sin) * long + abs(cos) * wide) + (drop + 2) * (1 + 1j)
    left, top, right, bottom = (min(max(int(edge), 0), canvas.shape[-1]) for corner in
                                (middle - half, middle + half) for edge in (corner.real, corner.imag))
    x, y = torch.arange(left, right) + (.5 - at.real), torch.arange(top, bottom)[:, None] + (.5 - at.imag)
    u = x * (cos / length) + y * (sin / length)                                           # h w
    v = y * (cos / width) - x * (sin / width) - u * (1 - u) * (bend * length / width)
    du, dv = -LIGHT[0] * cos - LIGHT[1] * sin, LIGHT[0] * sin - LIGHT[1] * cos            # away from the light
    both_u, both_v = torch.stack([u, u - du * drop / length]), torch.stack([v, v - dv * drop / width])  # 2 h w
    both_u = both_u + notch * (1 - 5 * both_v * both_v).clamp(min=0)
    t, s = (both_u - widest).clamp(min=0) / (1 - widest), (both_u - widest).clamp(max=0) / widest
    g = 1 - t * t
    f, f_shadow = g * (g.abs() * point + (1 - point)) - s * s * (1 - base * base) - both_v * both_v
    dark, plain, lit = torch.tensor(tone)[..., None, None] / 255                          # each 3 1 1
    under = canvas[:, top:bottom, left:right]                                             # 4 h w
    under[:3] *= 1 - shadow * (f_shadow + .4).clamp(0, 1) * (1 - dark / plain.clamp(min=.02)).clamp(min=.15)
    edge = (f + v * v).clamp(min=0).sqrt() + v.abs()  # f / edge: the distance across, keeps a pointed tip sharp
    cover = (f * width / (edge * point + 1.8 * (1 - point) + 1e-3) + .5).clamp(0, 1)
    along, across = slope[0] + (slope[1] - slope[0]) * u, v * curl + (v * 6).clamp(-1, 1) * crease
    lambert = (LIGHT[2] - along * du - across * dv) / (1 + along * along + across * across).sqrt() / LIGHT[2]
    heart, ray = (1 - u).clamp(0, 1), v / (u.clamp(min=0) + .35) * 4
    vein = (1 - (ray - ray.round()).abs() * 4).clamp(min=0) * veins
    colour = plain + (dark - plain) * (heart * (heart * deep + vein) + (1 - lambert) * .75).clamp(0, 1)  # 3 h w
    colour = colour + (lit - colour) * ((lambert - 1) * .8 + (1 - f * 4).clamp(min=0) * rim).clamp(0, .8)
    under *= 1 - cover
    under += torch.cat([colour, torch.ones_like(cover)[None]]) * cover


def layer(canvas: Tensor, blur: float = 0.) -> Image.Image:
    """Premultiplied canvas (4 S S) -> RGBA picture, out of focus by `blur` picture sides."""
    rgba = torch.cat([canvas[:3] / canvas[3:].clamp(min=1 / 255), canvas[3:]]).clamp(0, 1)
    return to_pil_image((rgba * 255 + .5).byte()).filter(ImageFilter.GaussianBlur(blur * canvas.shape[-1]))


def flower(kind: str, colour: str, rng: random.Random, side: int, radius: float) -> Image.Image:
    """A flower of KINDS and COLOURS from the front, in the middle of a transparent picture (side x side)."""
    canvas, middle, turn = torch.zeros(4, side, side), (side + side * 1j) / 2, rng.uniform(0, 2 * math.pi)
    (h, s, v), (petals, rows, ratio, disc, seeds, look) = COLOURS[colour], FORMS[kind]
    tone = tones(h + rng.uniform(-.015, .015), s * rng.uniform(.9, 1.06), v * rng.uniform(.95, 1.03))
    n = rng.randint(*petals)
    for k in range(n * len(rows)):  # outside first: what is nearer the middle lies above
        start, angle, width, r = 0, turn - k * GOLDEN, ratio * rng.uniform(.95, 1.05), max(1 - k / n, 0) ** .5
        if kind == "rosette":
            length, width = r ** 1.7, width * (1.4 - .4 * r * r)
        elif kind == "dahlia":
            length, start = min(.22 + .3 * r, .1 + r), max(.7 * r - .22, 0) * radius
        else:
            length, angle = rows[k // n], turn + 2 * math.pi * (k + k // n / 2 + rng.uniform(-.1, .1)) / n
        length *= radius * rng.uniform(.94, 1.03)
        petal(canvas, middle + rect(start, angle), angle, length, length * width, tone, **look)
    h, s, v = (.07, .72, .52) if kind == "sunflower" else (.115, .82, 1)
    dome, disc = dict(widest=.5, base=0, slope=(-1, 1), curl=1, deep=0), disc * radius * rng.uniform(.9, 1.1)
    if seeds:
        petal(canvas, middle - disc, 0, 2 * disc, disc, tones(h, s, v * .5), **dome)
    for k in range(seeds, 0, -1):
        r, size, angle = math.sqrt(k / seeds), .9 * disc / math.sqrt(seeds), k * GOLDEN
        tone = tones(h + .03 * r, s, v * rng.uniform(.75, .95) * (.75 + .35 * r * r))  # a darker heart
        petal(canvas, middle + rect(disc * r * .95 - size, angle), angle, 2 * size, size, tone, **dome)
    return layer(canvas)


def background(words: str, rng: random.Random, side: int, hue: float) -> Image.Image:
    """What lies behind a flower of this hue, out of focus: RGB (side x side)."""
    *ends, (n, colour, alpha, size, blur, flat), (leaves, value, grass) = BACKGROUNDS[words]
    free = hue + rng.uniform(.15, .85)
    ends = [tones(free if h is None else h + rng.uniform(-.025, .025), s, v)[1] for h, s, v in ends]
    picture = ImageOps.colorize(Image.linear_gradient("L").resize((side, side)), *ends)
    mask = Image.new("L", (side, side))
    for _ in range(n):
        x, y, r = rng.random() * side, rng.uniform(grass / 2, 1) * side, size * rng.uniform(.3, 1) * side
        box = x - r, y - r * flat, x + r, y + r * flat
        ImageDraw.Draw(mask).ellipse(box, fill=round(255 * alpha * rng.uniform(.5, 1)))
    picture.paste(tones(*colour)[1], (0, 0), mask.filter(ImageFilter.GaussianBlur(blur * side)))
    for far in (.03, rng.uniform(.006, .018)) if leaves else ():
        canvas = torch.zeros(4, side, side)
        for _ in range(leaves):
            at = side * complex(rng.uniform(-.05, 1.05), rng.uniform(.95 if grass else -.05, 1.05))
            length, angle = rng.uniform(.25, .5) * side, rng.uniform(-2, -1.1) if grass else rng.uniform(0, 6.3)
            green = tones(rng.uniform(.25, .36), rng.uniform(.5, .75), value * rng.uniform(.5, 1))
            petal(canvas, at, angle, length, length * (.06 if grass else .25), green, widest=.4, point=1,
                  crease=.25, bend=rng.uniform(-.3, .3))
        picture.paste(blurred := layer(canvas, far), (0, 0), blurred)
    return picture


def draw(seed: int, size: int = 64) -> tuple[Image.Image, str]:
    """The flower of a seed, RGB (size x size), and its caption. A larger size is the same flower, finer;
    consecutive seeds go round KINDS. ValueError below 16 pixels."""
    if size < 16:
        raise ValueError(f"size={size} is too small for a flower: use 16 or more, 64 for the embedded weights")
    rng, side, kind = random.Random(f"flower {seed}"), max(256, 2 * size), list(KINDS)[seed % len(KINDS)]
    colour, words, stem = rng.choice(KINDS[kind]), rng.choice(list(BACKGROUNDS)), rng.random() < .5
    picture = background(words, rng, side, COLOURS[colour][0])
    at = side * complex(.5 + rng.uniform(-.07, .07), (.39 if stem else .5) + rng.uniform(-.05, .05))
    if stem:
        canvas, foot = torch.zeros(4, side, side), complex(at.real + rng.uniform(-.13, .13) * side, 1.05 * side)
        green, bend, up = tones(rng.uniform(.26, .35), .66, rng.uniform(.4, .6)), rng.gauss(0, .12), at - foot
        petal(canvas, foot, phase(up), abs(up), .017 * side, green, base=.9, bend=bend, deep=0, curl=.9)
        for turn in rng.sample([-1, 1], rng.choice([1, 2, 2])):
            u, length, angle = rng.uniform(.2, .42), rng.uniform(.22, .33) * side, turn * rng.uniform(.6, 1.15)
            petal(canvas, foot + up * u * (1 + (1 - u) * bend * 1j), phase(up) + angle, length, length * .24,
                  green, widest=.42, base=.2, point=.9, crease=.35, bend=turn * .2)
        picture.paste(stalk := layer(canvas), (0, 0), stalk)
    front = flower(kind, colour, rng, side, side * (rng.uniform(.27, .34) if stem else rng.uniform(.34, .45)))
    front = front.resize([round(side * rng.uniform(.8, 1)) for _ in "xy"], Image.Resampling.BICUBIC)  # aslant
    x, y = round(at.real - front.width / 2), round(at.imag - front.height / 2)
    shadow = front.getchannel("A").filter(ImageFilter.GaussianBlur(.025 * side)).point(lambda alpha: alpha * .4)
    picture.paste((0, 0, 0), (x + round(.02 * side), y + round(.03 * side)), shadow)
    picture.paste(front, (x, y), front)
    picture = ImageOps.mirror(picture) if rng.random() < .5 else picture  # light from the right
    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return picture, f"a {colour} {kind} {'on a stem ' if stem else ''}{words}"


def save(folder: Path, pictures: Iterable[tuple[Image.Image, dict]], n: int) -> None:
    """Save pictures, of which there are n, and metadata.jsonl. FileExistsError if the folder is not empty."""
    if folder.resolve() == Path.cwd() or folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty, no folder, or where you are: choose a new name")
    part, lines = folder.with_name(f"{folder.name}.part"), []  # so that a folder is whole or not there
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for i, (picture, row) in enumerate(tqdm(pictures, "drawing", total=n, unit="picture")):
        picture.save(part / f"{i:05d}.png")
        lines.append(json.dumps({"file": f"{i:05d}.png", **row}) + "\n")
    (part / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    part.rename(folder)


def write(folder: str | Path, n: int = 200, size: int = 64, seed: int = 0) -> None:
    """Writes n flowers, 00000.png and on, and metadata.jsonl, {"file", "text", "tags", "subgroup"} a line. Different
    seeds share no flower. ValueError for too small an n or size, FileExistsError if the folder is not empty."""
    if n < 1 or not 16 <= size <= 4096:
        raise ValueError(f"n={n}, size={size}: ask for at least 1 flower, of 16 to 4096 pixels")

    def drawn():
        for i in range(n):
            picture, text = draw(random.Random(f"{seed}/{i}").getrandbits(40) * len(KINDS) + i, size)  # kind i % 6
            tags = [word for word in (*COLOURS, *KINDS) if f" {word} " in f"{text} "] + ["flower"]
            yield picture, {"text": text, "tags": tags, "subgroup": "plant-flower"}

    save(Path(folder), drawn(), n)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m tinyanl.flowers", description="Draws flowers with captions.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")
    p.add_argument("folder", type=Path, help="new or empty folder for the pictures and metadata.jsonl")
    p.add_argument("--n", type=int, default=200, help="number of flowers")
    p.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    p.add_argument("--seed", type=int, default=0, help="sets of different seeds share no flower")
    args = p.parse_args(argv)
    try:
        write(**vars(args))
    except (ValueError, OSError) as error:
        p.error(error)
    print(f"{args.n} flowers are in {args.folder}\nnext: python -m tinyanl.train --data {args.folder}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # petals are small: threads would only wait for each other
    main()
