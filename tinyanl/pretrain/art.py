"""Pictures to pretrain on, which look different every time they are drawn, and captions for them.

A folder's metadata.jsonl names its pictures (see data.py). Each has a "text", which describes it,
or else the "label" of the thing it shows; "tags", "style" and "subgroup" are optional. `composite`
lays cut-outs, turned and scaled, on new backgrounds. `caption` says something about a picture, and
`description` all that is known about it, so that two captions can be told from a negative pair.

B batch, N pictures, A side of the pictures kept, S side of those drawn.
"""
import math
import random
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..data import open_rgb, read_metadata

# style in metadata.jsonl -> what captions call it
STYLES = {"fluent3d": "a 3d icon", "noto": "a drawing", "twemoji": "a flat icon"}
COLOURS = {  # of backgrounds, RGB
    "white": (255, 255, 255),
    "black": (16, 16, 18),
    "gray": (136, 138, 140),
    "red": (214, 48, 49),
    "orange": (243, 146, 55),
    "yellow": (250, 214, 77),
    "green": (67, 160, 71),
    "teal": (38, 166, 154),
    "blue": (52, 120, 214),
    "purple": (126, 87, 194),
    "pink": (244, 143, 177),
    "brown": (121, 85, 72),
}
LARGEST_TURN = 0.21  # radians: 12 degrees
HELD_OUT_EVERY = 10


class Art(NamedTuple):
    """Pictures that `composite` draws from."""

    pixels: Tensor  # N 4 A A, uint8: colour times alpha, and alpha
    rows: list[dict]  # of metadata.jsonl, one per picture
    weights: Tensor  # (N,) relative chances to be drawn: every folder is drawn from equally often

    def select(self, indices: list[int]) -> "Art":
        rows = [self.rows[i] for i in indices]
        return Art(self.pixels[indices], rows, self.weights[indices])

    def split(self) -> tuple["Art", dict[str, "Art"]]:
        """Pictures to train on, and the held-out ones, which are every tenth: by name, those with a
        text and those with a label, where there are any. ValueError: fewer than two pictures."""
        n = len(self.rows)
        if n < 2:
            raise ValueError(f"no pictures are left to train on: of {n}, every tenth is held out")
        training = [i for i in range(n) if i % HELD_OUT_EVERY]
        held_out = range(0, n, HELD_OUT_EVERY)
        parts = {
            "pictures with text": [i for i in held_out if self.rows[i]["text"]],
            "pictures with label": [i for i in held_out if not self.rows[i]["text"]],
        }
        named = {name: self.select(indices) for name, indices in parts.items() if indices}
        return self.select(training), named


def complete_row(row: dict, folder: Path) -> dict:
    """A row of metadata.jsonl with all that captions are made of. ValueError names its picture."""
    row = {"label": "picture", **row, "path": folder / row["file"]}
    row["tags"] = row.get("tags") or []
    row["subgroup"] = row.get("subgroup") or ""
    are_text = isinstance(row["label"], str) and isinstance(row["subgroup"], str)
    are_tags = isinstance(row["tags"], list) and all(isinstance(tag, str) for tag in row["tags"])
    if not (are_text and are_tags):
        message = '"label", "subgroup" and each of "tags" must be text'
        raise ValueError(f"{row['path']}: {message}")
    return row


def read_pixels(path: Path, side: int) -> Tensor:
    """A picture file -> (4 A A) uint8, A = side: colour times alpha, and alpha.

    Opaque pictures are cropped to a square, others padded to one, with a transparent frame.
    ValueError names the file."""
    try:
        picture = open_rgb(path, keep_alpha=True)
    except ValueError as error:
        raise ValueError(f"{error}: mend it or take its line out") from error
    lowest_alpha, _ = picture.getchannel("A").getextrema()
    if lowest_alpha < 255:
        picture = ImageOps.pad(picture, (side - 2, side - 2), Image.Resampling.LANCZOS)
        picture = ImageOps.expand(picture, border=1, fill=(0, 0, 0, 0))
    else:
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS)
    x = TF.pil_to_tensor(picture)  # 4 A A
    colour, alpha = x[:3], x[3:]
    return torch.cat([(colour.float() * alpha / 255).round().byte(), alpha])


def read_art(folders: list[Path], side: int = 80) -> Art:
    """All pictures that metadata.jsonl of these folders name, kept larger than they will be drawn.

    ValueError names the file or the line at fault. OSError: there is no metadata.jsonl."""
    pixels: list[Tensor] = []
    rows: list[dict] = []
    weights: list[float] = []
    for folder in map(Path, folders):
        found = read_metadata(folder)
        if not found:
            raise ValueError(f"{folder / 'metadata.jsonl'} names no pictures")
        for row in tqdm(found, "reading art", leave=False, delay=5):
            row = complete_row(row, folder)
            rows.append(row)
            pixels.append(read_pixels(row["path"], side))
            weights.append(1 / len(found))
    return Art(torch.stack(pixels), rows, torch.tensor(weights))


def uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Numbers of this shape, spread evenly from low to high."""
    return torch.rand(*shape, generator=g) * (high - low) + low


def draw_front(pixels: Tensor, size: int, g: torch.Generator) -> Tensor:
    """Pictures (B 4 A A) in [0, 1] -> (B 4 S S) in [0, 1], mirrored half of the time and, if they
    are cut-outs, turned, scaled and moved."""
    b = len(pixels)
    is_cut_out = (pixels[:, 3].flatten(1).amin(1) < 1).float()  # B
    angle = uniform(g, -LARGEST_TURN, LARGEST_TURN, b) * is_cut_out
    scale = 1 - uniform(g, 0, 0.3, b) * is_cut_out
    mirror = uniform(g, 0, 1, b).round() * 2 - 1  # -1 or 1
    shift = uniform(g, -1, 1, b, 2) * (1 - scale)[:, None]  # B 2
    cos = angle.cos() / scale
    sin = angle.sin() / scale
    rows = [cos * mirror, -sin * mirror, shift[:, 0], sin, cos, shift[:, 1]]
    affine = torch.stack(rows, dim=1).view(b, 2, 3)
    parts = []
    for part, theta in zip(pixels.split(256), affine.split(256), strict=True):
        # drawn twice as large and averaged: smooth edges
        grid = F.affine_grid(theta, [len(part), 4, 2 * size, 2 * size], align_corners=False)
        drawn = F.grid_sample(part, grid, "bicubic", "border", align_corners=False)
        parts.append(F.avg_pool2d(drawn, 2))
    return torch.cat(parts).clamp(0, 1)  # B 4 S S


def draw_backgrounds(
    art: Art, b: int, size: int, g: torch.Generator
) -> tuple[Tensor, list[str], Tensor]:
    """b backgrounds: half are of one colour, a quarter gradients, a quarter close-ups of other art.

    Returns them (B 3 S S) in [0, 1], the name of the (first) colour of each, and whether each shows
    that colour alone (B,)."""
    indices = torch.randint(len(COLOURS), (2, b), generator=g)
    colours = torch.tensor(list(COLOURS.values()))[indices] / 255  # 2 B 3
    colours = colours + torch.randn(2, b, 3, generator=g) * 0.04
    first, second = colours.clamp(0, 1)[..., None, None]  # each B 3 1 1
    kind = uniform(g, 0, 1, b, 1, 1, 1)
    angle = uniform(g, 0, 2 * math.pi, b, 1, 1, 1)
    line = torch.linspace(-0.5, 0.5, size)
    ramp = (0.5 + angle.cos() * line + angle.sin() * line[:, None]).clamp(0, 1)  # B 1 S S
    page = torch.where(kind < 0.5, first, first + (second - first) * ramp)  # B 3 S S

    margin = art.pixels.shape[-1] // 4
    others = torch.randint(len(art.rows), (b,), generator=g)
    close_up = art.pixels[others, :, margin:-margin, margin:-margin].float() / 255
    close_up = F.adaptive_avg_pool2d(close_up, 5)
    close_up = F.interpolate(close_up, size, mode="bicubic").clamp(0, 1)  # B 4 S S
    close_up = close_up[:, :3] + (1 - close_up[:, 3:]) * first  # B 3 S S
    page = torch.where(kind < 0.75, page, close_up)
    names = [list(COLOURS)[i] for i in indices[0]]
    return page, names, kind.flatten() < 0.5


def composite(
    art: Art, n: int | Tensor, size: int, g: torch.Generator
) -> tuple[Tensor, Tensor, list[str | None]]:
    """n pictures drawn at random, or those of the given indices (B,), as they look this time.

    Returns x (B 3 S S) in [-1, 1], their indices (B,), and the colour behind each: None where that
    is not one colour, or not to be seen. ValueError: there are no pictures to draw from."""
    if not art.rows:
        raise ValueError(
            "no pictures are left to draw from, once the families held out of the U-Net are gone: "
            "give more --data"
        )
    if isinstance(n, int):
        index = torch.multinomial(art.weights, n, replacement=True, generator=g)
    else:
        index = n
    pixels = art.pixels[index].float() / 255  # B 4 A A
    front = draw_front(pixels, size, g)  # B 4 S S
    page, colours, is_plain = draw_backgrounds(art, len(index), size, g)
    x = (front[:, :3] + (1 - front[:, 3:]) * page).clamp(0, 1) * 2 - 1  # B 3 S S
    is_cut_out = pixels[:, 3].flatten(1).amin(1) < 1  # B
    is_shown = (is_plain & is_cut_out).tolist()
    behind = [colour if shown else None for colour, shown in zip(colours, is_shown, strict=True)]
    return x, index, behind


def name_of(row: dict) -> str:
    """The text of a picture, or else its label: "a rose"."""
    return row["text"] or f"a {row['label']}"


def caption(row: dict, background: str | None, dice: random.Random) -> str:
    """One of the captions of a picture. background: the colour behind it, as `composite` says."""
    tags = row["tags"]
    if tags and dice.random() < 0.25:
        chosen = dice.sample(tags, min(len(tags), dice.choice([1, 2])))
        return " ".join(["a", *(tag for tag in tags if tag in chosen)])
    if row["text"]:
        return row["text"]
    style = STYLES.get(row.get("style"), "a picture")
    name = name_of(row)
    words = dice.choice([row["label"], name, f"{style} of {name}"])
    return words + dice.choice(["", ground(background)])


def description(row: dict, background: str | None) -> str:
    """All words that a caption of this picture may use: a superset of every `caption` of it."""
    style = STYLES.get(row.get("style"), "a picture")
    return " ".join(["a", name_of(row), style, "of", *row["tags"], ground(background)])


def ground(background: str | None) -> str:
    return f" on a {background} background" if background else ""
