"""Draws the sample data set, flowers with captions: `python -m tinyanl.flowers ./flowers --n 200`.

All in focus is one shape, the petal (seeds, stems and leaves too), painted back to front on a canvas (4 S S) of
premultiplied RGBA in 0..1. In its own coordinates, u from base 0 to tip 1, v across from -1 to 1, it is f > 0 of

    f = g (1 - point + point |g|) - (1 - base^2) s^2 - v^2,    g = 1 - t^2,
    t = max(u - widest, 0) / (1 - widest),    s = min(u - widest, 0) / widest

One light shades it by its normal (Lambert). Seeds, and petals of roses and dahlias, sit at the golden angle (Vogel
1979). Pixels see + - * / and sqrt only, which round alike on any number of threads: a seed always gives the same.

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
from cmath import phase, rect
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

GOLDEN = math.pi * (3 - math.sqrt(5))
LIGHT = (-.52, -.60, .61)  # unit vector to the light: left, up, out of the picture
COLOURS = {"red": (.985, .84, .86), "orange": (.07, .86, .97), "yellow": (.135, .82, .98), "white": (.12, .05, .97),
           "pink": (.93, .44, .97), "magenta": (.87, .74, .86), "purple": (.765, .6, .76), "blue": (.62, .64, .89)}
# top and bottom (hue None: any but the flower's); blobs: number, colour, opacity, size, blur, height / width;
# leaves: number, brightness, whether they are blades of grass
BACKGROUNDS = {
    "with green leaves": ((.3, .6, .36), (.33, .65, .2), (12, (.25, .45, .85), .35, .05, .006, 1), (8, .6, False)),
    "in a meadow": ((.56, .38, .92), (.28, .6, .4), (16, (.15, .3, 1), .5, .04, .006, 1), (13, .7, True)),
    "against the sky": ((.59, .58, .88), (.56, .16, .97), (6, (0, 0, 1), .9, .2, .035, .35), (0, 0, False)),
    "on a plain background": ((None, .15, .98), (None, .24, .84), (0, (0, 0, 1), 0, 0, 0, 1), (0, 0, False)),
    "on a dark background": ((None, .35, .16), (None, .35, .05), (9, (.6, .3, .5), .3, .05, .006, 1), (3, .2, False))}
# petals a row, length of each row, half width / length, look of a petal; radius, number and colour of the seeds
KINDS = {
    "daisy": ((14, 18), (1, .72), .082, dict(widest=.74, base=.45, curl=.8, crease=-.12, slope=(-.2, .4), shadow=.8),
              (.29, 60, (.115, .82, 1))),
    "rosette": ((21, 24), (1,), .62, dict(base=.6, point=.2, curl=-.25, slope=(-1.2, .1), deep=2.5, rim=.7, shadow=.4),
                None),
    "five petal flower": ((5, 5), (1,), .52, dict(widest=.7, base=.2, notch=.14, curl=.35, deep=1, veins=.35, rim=.3),
                          (.15, 24, (.115, .82, 1))),
    "star flower": ((5, 7), (1,), .2, dict(widest=.42, point=1, curl=.3, crease=.45), (.13, 14, (.125, .7, 1))),
    "sunflower": ((15, 19), (1, .88), .15, dict(base=.5, point=.95, crease=.15), (.41, 120, (.07, .72, .62))),
    "dahlia": ((62, 72), (1,), .3, dict(widest=.5, base=.6, point=1, curl=-.7, slope=(-.4, .3), deep=.8, rim=.5,
                                        shadow=.9), None)}


def tones(h: float, s: float, v: float) -> list[tuple[int, ...]]:
    """RGB bytes of a surface of this hue (wraps), saturation and value (0 to 1): in shadow, plain, in full light."""
    shades = (h - .02, min(s * 1.2 + .07, 1), v * .52), (h, s, v), (h, s * .5, v * .5 + .5)
    return [tuple(round(255 * min(c, 1)) for c in colorsys.hsv_to_rgb(h % 1, s, v)) for h, s, v in shades]


def petal(canvas: Tensor, at: complex, angle: float, length: float, width: float, tone: list, widest=.6, base=.4,
          point=0., notch=0., bend=0., slope=(-.2, .3), curl=.5, crease=0., deep=.6, veins=0., rim=0., shadow=.5):
    """Paints a petal on canvas (4 S S), in place. at: its base, x + iy; length and half width in pixels too.
    slope: fall at base and tip; crease: fold along the middle; deep: how dark the base, rim: how light the edge."""
    way, middle = rect(1, angle), at + rect(length * .48, angle)
    cos, sin, drop = way.real, way.imag, min(length * .09, width * .3)  # drop: how far its shadow falls
    long, wide = length * .56, width + length * abs(bend) / 4
    half = complex(abs(cos) * long + abs(sin) * wide, abs(sin) * long + abs(cos) * wide) + (drop + 2) * (1 + 1j)
    left, top, right, bottom = (min(max(int(edge), 0), canvas.shape[-1]) for corner in (middle - half, middle + half)
                                for edge in (corner.real, corner.imag))
    if left >= right or top >= bottom:
        return
    x, y = torch.arange(left, right) + (.5 - at.real), torch.arange(top, bottom)[:, None] + (.5 - at.imag)
    u = x * (cos / length) + y * (sin / length)                                           # h w
    v = y * (cos / width) - x * (sin / width) - u * (1 - u) * (bend * length / width)

    def inside(u: Tensor, v: Tensor) -> Tensor:
        v2 = v * v
        u = u + notch * (1 - 5 * v2).clamp(min=0)
        t, s = (u - widest).clamp(min=0) / (1 - widest), (u - widest).clamp(max=0) / widest
        g = 1 - t * t
        return g * (g.abs() * point + (1 - point)) - s * s * (1 - base * base) - v2

    dark, plain, lit = torch.tensor(tone)[..., None, None] / 255                          # each 3 1 1
    under = canvas[:, top:bottom, left:right]                                             # 4 h w
    du, dv = -LIGHT[0] * cos - LIGHT[1] * sin, LIGHT[0] * sin - LIGHT[1] * cos            # away from the light
    shade = (inside(u - du * drop / length, v - dv * drop / width) * 1.1 + .45).clamp(0, 1) * shadow
    under[:3] *= 1 - shade * (1 - dark / plain.clamp(min=.02)).clamp(min=.15)
    f = inside(u, v)
    edge = (f + v * v).clamp(min=0).sqrt() + v.abs()  # f / edge is the distance across: keeps a pointed tip sharp
    cover = (f * width / (edge * point + 1.8 * (1 - point) + 1e-3) + .5).clamp(0, 1)
    along, across = slope[0] + (slope[1] - slope[0]) * u, v * curl + (v * 6).clamp(-1, 1) * crease
    lambert = (LIGHT[2] - along * du - across * dv) / (1 + along * along + across * across).sqrt() / LIGHT[2]
    heart, ray = (1 - u).clamp(0, 1), v / (u.clamp(min=0) + .35) * 4
    vein = (1 - (ray - ray.round()).abs() * 4).clamp(min=0) * veins
    colour = plain + (dark - plain) * (heart * (heart * deep + vein) + (1 - lambert) * .75).clamp(0, 1)  # 3 h w
    colour = colour + (lit - colour) * ((lambert - 1) * .8 + (1 - f * 4).clamp(min=0) * rim).clamp(0, .8)
    under *= 1 - cover
    under[:3] += colour * cover
    under[3] += cover


def layer(canvas: Tensor) -> Image.Image:
    """Premultiplied canvas (4 S S) -> RGBA picture."""
    rgba = torch.cat([canvas[:3] / canvas[3:].clamp(min=1 / 255), canvas[3:]]).clamp(0, 1)
    return to_pil_image((rgba * 255 + .5).to(torch.uint8))


def flower(kind: str, colour: str, rng: random.Random, side: int, radius: float) -> Image.Image:
    """A flower of KINDS and COLOURS from the front, in the middle of a transparent picture (side x side)."""
    canvas, middle, turn = torch.zeros(4, side, side), (side + side * 1j) / 2, rng.uniform(0, 2 * math.pi)
    petals, rows, ratio, look, disc = KINDS[kind]
    h, s, v = COLOURS[colour]
    tone = tones(h + rng.uniform(-.015, .015), s * rng.uniform(.9, 1.06), v * rng.uniform(.95, 1.03))
    n = rng.randint(*petals)
    for k in range(n * len(rows)):  # outside first: what is nearer the middle lies above
        start, angle, width = 0, turn - k * GOLDEN, ratio * rng.uniform(.95, 1.05)
        if kind == "rosette":
            length, width = (1 - k / n) ** .85, width * (1 + .4 * k / n)
        elif kind == "dahlia":
            r = math.sqrt(1 - k / n)
            length = min(.22 + .3 * r, .1 + r)
            start = max(r - length, 0) * radius
        else:
            length, angle = rows[k // n], turn + 2 * math.pi * (k + k // n / 2 + rng.uniform(-.1, .1)) / n
        length *= radius * rng.uniform(.94, 1.03)
        petal(canvas, middle + rect(start, angle), angle, length, length * width, tone, **look)
    if disc:
        (share, seeds, (h, s, v)), dome = disc, dict(widest=.5, base=0, slope=(-1, 1), curl=1, deep=0)
        disc = share * radius * rng.uniform(.9, 1.1)
        petal(canvas, middle - disc, 0, 2 * disc, disc, tones(h, s, v * .5), **dome)
        for k in range(seeds, 0, -1):
            r, size = math.sqrt(k / seeds), .9 * disc / math.sqrt(seeds)
            tone = tones(h + .03 * r, s, min(v * rng.uniform(.5, .7) * (1 + r * r * .5), 1))  # the heart is darker
            petal(canvas, middle + rect(disc * r * .95 - size, k * GOLDEN), k * GOLDEN, 2 * size, size, tone, **dome)
    return layer(canvas)


def background(words: str, rng: random.Random, side: int, hue: float) -> Image.Image:
    """What lies behind a flower of this hue, out of focus: RGB (side x side)."""
    *ends, (n, colour, alpha, size, blur, flat), (leaves, value, grass) = BACKGROUNDS[words]
    free = hue + rng.uniform(.15, .85)
    ends = [tones(free if h is None else h + rng.uniform(-.025, .025), s, v)[1] for h, s, v in ends]
    picture = ImageOps.colorize(Image.linear_gradient("L").resize((side, side)), *ends)
    mask = Image.new("L", (side, side))
    for _ in range(n):
        x, y, r = rng.random() * side, rng.uniform(.5 * grass, 1) * side, size * rng.uniform(.3, 1) * side
        ImageDraw.Draw(mask).ellipse((x - r, y - r * flat, x + r, y + r * flat), round(255 * alpha * rng.uniform(.5, 1)))
    picture.paste(tones(*colour)[1], (0, 0), mask.filter(ImageFilter.GaussianBlur(blur * side)))
    for far in (.03, rng.uniform(.006, .018)) if leaves else ():
        canvas = torch.zeros(4, side, side)
        for _ in range(leaves):
            at = side * complex(rng.uniform(-.05, 1.05), rng.uniform(.95 if grass else -.05, 1.05))
            length, angle = rng.uniform(.22, .45) * side, rng.uniform(-2, -1.1) if grass else rng.uniform(0, 6.3)
            green = tones(rng.uniform(.25, .36), rng.uniform(.5, .75), value * rng.uniform(.5, 1))
            petal(canvas, at, angle, length * (1 + .4 * grass), length * (.07 if grass else .26), green, widest=.4,
                  point=1., crease=.25, bend=rng.uniform(-.3, .3))
        leaf = layer(canvas).filter(ImageFilter.GaussianBlur(far * side))
        picture.paste(leaf, (0, 0), leaf)
    return picture


def draw(seed: int, size: int = 64) -> tuple[Image.Image, str]:
    """The flower of a seed, RGB (size x size), and its caption. A larger size is the same flower, finer; consecutive
    seeds go round KINDS. ValueError below 16 pixels."""
    if size < 16:
        raise ValueError(f"size={size} is too small to show a flower: use at least 16 (the embedded weights want 64)")
    rng, side, kind = random.Random(f"flower {seed}"), max(256, 2 * size), list(KINDS)[seed % len(KINDS)]
    colour = rng.choice(["yellow", "orange", "red"] if kind == "sunflower" else list(COLOURS))
    words, stem = rng.choice(list(BACKGROUNDS)), rng.random() < .5
    picture = background(words, rng, side, COLOURS[colour][0])
    x, y = (.5 + rng.uniform(-.07, .07)) * side, ((.39 if stem else .5) + rng.uniform(-.05, .05)) * side
    if stem:
        canvas, foot = torch.zeros(4, side, side), x + complex(rng.uniform(-.13, .13), 1.05) * side
        green, bend, up = tones(rng.uniform(.26, .35), .66, rng.uniform(.42, .6)), rng.uniform(-.25, .25), x + y * 1j - foot
        angle = phase(up)
        petal(canvas, foot, angle, abs(up), .017 * side, green, base=.9, bend=bend, deep=0., curl=.9)
        for turn in rng.sample([-1, 1], rng.choice([1, 2, 2])):
            u, length = rng.uniform(.2, .42), rng.uniform(.22, .33) * side
            petal(canvas, foot + up * u * (1 + (1 - u) * bend * 1j), angle + turn * rng.uniform(.6, 1.15), length,
                  length * rng.uniform(.2, .28), green, widest=.42, base=.2, point=.9, crease=.35, bend=turn * .2)
        leaves = layer(canvas)
        picture.paste(leaves, (0, 0), leaves)
    front = flower(kind, colour, rng, side, side * (rng.uniform(.27, .34) if stem else rng.uniform(.34, .45)))
    front = front.resize([round(side * rng.uniform(.8, 1)) for _ in "xy"], Image.Resampling.BICUBIC)  # seen aslant
    corner = round(x - front.width / 2), round(y - front.height / 2)
    shadow = front.getchannel("A").filter(ImageFilter.GaussianBlur(.025 * side)).point(lambda alpha: alpha * .4)
    picture.paste((0, 0, 0), (corner[0] + round(.02 * side), corner[1] + round(.03 * side)), shadow)
    picture.paste(front, corner, front)
    picture = ImageOps.mirror(picture) if rng.random() < .5 else picture  # light from the right
    caption = f"a {colour} {kind} {'on a stem ' if stem else ''}{words}"
    return picture.resize((size, size), Image.Resampling.LANCZOS), caption


def write(folder: str | Path, n: int = 200, size: int = 64, seed: int = 0) -> None:
    """Writes n flowers, 00000.png and on, and metadata.jsonl, a line {"file", "text"} each. Sets of different seeds
    share no flower. ValueError for too small an n or size, FileExistsError if the folder is not empty."""
    folder, lines = Path(folder), []
    if n < 1:
        raise ValueError(f"n={n}: ask for at least 1 flower")
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not an empty folder: choose a new name, or move it away first")
    for i in tqdm(range(n), desc="drawing", unit="flower"):
        own = random.Random(f"{seed}/{i}").getrandbits(40) * len(KINDS) + i  # i decides the kind: all equally often
        picture, text = draw(own, size)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{i:05d}.png")
        lines.append(json.dumps({"file": f"{i:05d}.png", "text": text}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m tinyanl.flowers", description="Draws flowers with captions.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("folder", type=Path, help="new or empty folder for the pictures and metadata.jsonl")
    p.add_argument("--n", type=int, default=200, help="number of flowers")
    p.add_argument("--size", type=int, default=64, help="side of a picture in pixels")
    p.add_argument("--seed", type=int, default=0, help="sets of different seeds share no flower")
    args = p.parse_args(argv)
    try:
        write(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"{args.n} flowers of {args.size} pixels, with captions in metadata.jsonl, are in {args.folder}\n"
          f"next: python -m tinyanl.train --data {args.folder}")


if __name__ == "__main__":
    main()
