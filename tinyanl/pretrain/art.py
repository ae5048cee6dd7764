"""Pictures to pretrain on: cut-outs that look different at every look, and captions that say what is seen.

A folder's metadata.jsonl names them (data.py), each with "text" or else the "label" of a thing, and maybe "tags",
"style" and "subgroup". `composite` lays cut-outs, turned and scaled, on new backgrounds; `say` gives a caption of some
that is known, and one of all: captions true of another picture too are no negatives. B batch, S picture side.
"""
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..data import open_rgb, read_metadata

STYLES = {"fluent3d": "a 3d icon", "noto": "a drawing", "twemoji": "a flat icon"}  # of emoji, in captions
COLOURS = {"white": (255, 255, 255), "black": (16, 16, 18), "gray": (136, 138, 140), "red": (214, 48, 49),
           "orange": (243, 146, 55), "yellow": (250, 214, 77), "green": (67, 160, 71), "teal": (38, 166, 154),
           "blue": (52, 120, 214), "purple": (126, 87, 194), "pink": (244, 143, 177), "brown": (121, 85, 72)}


class Art(NamedTuple):
    pixels: Tensor  # N 4 A A, uint8: colour times alpha, and alpha
    rows: list[dict]  # of metadata.jsonl, one per picture
    chance: Tensor  # N, relative: every folder is drawn from equally often

    def where(self, keep: Callable[[int, dict], bool]) -> "Art":
        """The pictures for which keep(i, row) is true."""
        ids = [i for i, row in enumerate(self.rows) if keep(i, row)]
        return Art(self.pixels[ids], [self.rows[i] for i in ids], self.chance[ids])

    def split(self) -> tuple["Art", dict[str, "Art"]]:
        """Art to train on; and every tenth picture, held out: those with a text, those with a label."""
        if len(self.rows) < 2:
            raise ValueError(f"no pictures are left to train on: of {len(self.rows)}, every tenth is held out")
        held = {"pictures with text": self.where(lambda i, row: i % 10 == 0 and row["text"]),
                "pictures with label": self.where(lambda i, row: i % 10 == 0 and not row["text"])}
        return self.where(lambda i, row: i % 10), {name: art for name, art in held.items() if art.rows}


def read_art(folders: list[Path], side: int = 80) -> Art:
    """All pictures that the metadata.jsonl of these folders name. A = side: larger than they will be shown.
    ValueError names the file or the line at fault, OSError: there is no metadata.jsonl."""
    pixels, rows, chance = [], [], []
    for folder in folders:
        if not (found := read_metadata(Path(folder))):
            raise ValueError(f"{Path(folder) / 'metadata.jsonl'} names no pictures")
        for row in tqdm(found, "reading art", leave=False, delay=5):
            row["path"], row["label"] = Path(folder) / row["file"], row.get("label", "picture")
            row["tags"], row["subgroup"] = row.get("tags") or [], row.get("subgroup") or ""
            texts = [row["label"], row["subgroup"], *(row["tags"] if isinstance(row["tags"], list) else [None])]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{row['path']}: \"label\", \"subgroup\" and each of \"tags\" must be text")
            try:
                picture = open_rgb(row["path"], keep_alpha=True)
            except ValueError as error:
                raise ValueError(f"{error}: mend it or take its line out") from error
            frame = int(picture.getchannel("A").getextrema()[0] < 255)  # transparent, around what is cut out
            fit = ImageOps.pad if frame else ImageOps.fit
            picture = fit(picture, (side - 2 * frame,) * 2, Image.Resampling.LANCZOS)
            x = F.pad(TF.pil_to_tensor(picture), [frame] * 4)                                 # 4 A A
            pixels.append(torch.cat([(x[:3].float() * x[3:] / 255).round().byte(), x[3:]]))
        rows += found
        chance += [1 / len(found)] * len(found)
    return Art(torch.stack(pixels), rows, torch.tensor(chance))


def composite(art: Art, n: int | Tensor, size: int, g: torch.Generator) -> tuple[Tensor, Tensor, list[str | None]]:
    """n pictures drawn at random, or those of given indices, each as it looks this time.

    Returns x (B 3 S S) in [-1, 1], their indices (B,), and the colour behind each, None where it is not one colour.
    Backgrounds are plain, linear gradients and blurred close-ups of other art; opaque pictures are only mirrored."""
    if not art.rows:
        raise ValueError("no pictures are left to draw from, once the families held out of the U-Net are gone")
    index = torch.multinomial(art.chance, n, replacement=True, generator=g) if isinstance(n, int) else n
    b = len(index)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(b, *shape, generator=g) * (high - low) + low

    pixels = art.pixels[index].float() / 255                                              # B 4 A A
    cut = (pixels[:, 3].flatten(1).amin(1) < 1).float()  # 0: opaque                      # B
    angle, scale = uniform(-0.21, 0.21) * cut, 1 - uniform(0, 0.3) * cut  # 0.21 rad: 12 degrees
    mirror, shift = uniform(0, 1).round() * 2 - 1, uniform(-1, 1, 2) * (1 - scale)[:, None]
    cos, sin = angle.cos() / scale, angle.sin() / scale
    turn = torch.stack([cos * mirror, -sin * mirror, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(b, 2, 3)
    fine = []  # drawn twice as large: smooth edges
    for part, theta in zip(pixels.split(256), turn.split(256)):
        grid = F.affine_grid(theta, [len(part), 4, 2 * size, 2 * size], align_corners=False)
        fine.append(F.avg_pool2d(F.grid_sample(part, grid, "bicubic", "border", align_corners=False), 2))
    front = torch.cat(fine).clamp(0, 1)                                                   # B 4 S S

    pick = torch.randint(len(COLOURS), (2, b), generator=g)
    ends = torch.tensor(list(COLOURS.values()))[pick] / 255 + torch.randn(2, b, 3, generator=g) * 0.04
    first, second = ends.clamp(0, 1)[..., None, None]                                     # each B 3 1 1
    kind, way, line = uniform(0, 1, 1, 1, 1), uniform(0, 2 * math.pi, 1, 1, 1), torch.linspace(-0.5, 0.5, size)
    ramp = (0.5 + way.cos() * line + way.sin() * line[:, None]).clamp(0, 1)               # B 1 S S
    back = torch.where(kind < 0.5, first, first + (second - first) * ramp)                # B 3 S S
    a = pixels.shape[-1] // 4
    close = art.pixels[torch.randint(len(art.rows), (b,), generator=g), :, a:-a, a:-a].float() / 255
    close = F.interpolate(F.adaptive_avg_pool2d(close, 5), size, mode="bicubic").clamp(0, 1)  # B 4 S S
    back = torch.where(kind < 0.75, back, close[:, :3] + (1 - close[:, 3:]) * first)
    plain = (kind.flatten() < 0.5) & (cut > 0)
    names = [list(COLOURS)[i] if one else None for i, one in zip(pick[0], plain)]
    return (front[:, :3] + (1 - front[:, 3:]) * back).clamp(0, 1) * 2 - 1, index, names


def say(row: dict, behind: str | None, dice: random.Random) -> tuple[str, str]:
    """One of the captions of a picture of art, and all that could be said of it. behind: a colour, from `composite`."""
    style, tags = STYLES.get(row.get("style"), "a picture"), row["tags"]
    name, ground = row["text"] or f"a {row['label']}", f" on a {behind} background" if behind else ""
    if tags and dice.random() < 0.25:
        some = dice.sample(tags, min(len(tags), dice.choice([1, 2])))
        said = " ".join(["a", *(tag for tag in tags if tag in some)])
    else:
        said = row["text"] or dice.choice([row["label"], name, f"{style} of {name}"]) + dice.choice(["", ground])
    return said, " ".join(["a", name, style, "of", *tags, ground])
