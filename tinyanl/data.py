"""A folder of images -> verified pictures, captions and labels.

    DIR/*.jpg                        pictures, at any depth, sorted by path so that runs repeat
    DIR/cats/*.jpg DIR/dogs/*.jpg    every picture in one of two or more first-level sub-folders: classes
    DIR/metadata.jsonl               lines of {"file": "a.jpg", "text": "a rose"}: these files, in this order

For pretraining, `read_art` takes the pictures of such a list as art, each with "text" or else the "label" of a thing,
and maybe "tags", "style" and "subgroup"; `composite` turns and scales cut-outs on a new background at every look.
Labels come from sub-folders (any other layout, a mixed one too, has no classes), captions from metadata.jsonl;
pictures that it does not name are skipped. Hidden files are passed over, linked folders followed.

Copy this file alone: it needs torch, torchvision and tqdm, nothing else of tinyanl. Usage:

    from PIL import Image
    from data import describe, open_rgb, scan, to_square
    Image.new("RGB", (96, 64), "orange").save("a.png")
    folder = scan(".", size=64)
    x = to_square(open_rgb(folder.pictures[0].path), size=64)
    print(describe(folder), tuple(x.shape), x.min().item(), x.max().item())
"""
import json
import math
import os
import random
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

# where Pillow cannot read avif or heic they are named among the skipped, not passed over in silence
KINDS = {f".{k}" for k in "png jpg jpeg jfif webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif heic heif".split()}
STYLES = {"fluent3d": "a 3d icon", "noto": "a drawing", "twemoji": "a flat icon"}  # of emoji, in captions
COLOURS = {"white": (255, 255, 255), "black": (16, 16, 18), "gray": (136, 138, 140), "red": (214, 48, 49),
           "orange": (243, 146, 55), "yellow": (250, 214, 77), "green": (67, 160, 71), "teal": (38, 166, 154),
           "blue": (52, 120, 214), "purple": (126, 87, 194), "pink": (244, 143, 177), "brown": (121, 85, 72)}


class Picture(NamedTuple):
    path: Path
    text: str | None
    label: int | None  # index into classes


class Folder(NamedTuple):
    pictures: list[Picture]
    classes: list[str]
    skipped: list[tuple[Path, str]]  # file, reason
    enlarged: int  # pictures whose shorter side is below the wanted size


def scan(root: str | Path, size: int) -> Folder:
    """Find and decode the pictures of a folder (or one picture file) that will be used at `size` pixels.
    FileNotFoundError: no such path. ValueError: no readable picture, or a bad line in metadata.jsonl."""
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root.absolute()} does not exist: name a folder of images, or one image")
    if root.is_file():
        return Folder([Picture(root, None, None)], [], [], int(min(open_rgb(root).size) < size))
    files, skipped, seen = [], [], {}  # seen: real path -> where it was met
    for top, folders, names in os.walk(root, True, lambda e: skipped.append((Path(e.filename), e.strerror)), True):
        if (first := seen.setdefault(os.path.realpath(top), top)) != top:  # a link to a folder above would never end
            skipped.append((Path(top), f"the folder {first} again"))
            folders.clear(), names.clear()
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        files += [Path(top, f).relative_to(root) for f in names]
    files = [f for f in files if not any(part.startswith((".", "__MACOSX")) for part in f.parts)]
    found = sorted((f for f in files if f.suffix.lower() in KINDS), key=Path.as_posix)
    rows = [(f, None) for f in found]
    if (root / "metadata.jsonl").exists():
        rows = [(Path(row["file"]), row["text"]) for row in _read_metadata(root)]
    kept, enlarged = [], 0
    for file, text in tqdm(rows, "reading pictures", leave=False, delay=5):
        try:
            enlarged += min(open_rgb(root / file).size) < size
            kept.append((file, text))
        except ValueError as error:
            skipped.append((root / file, str(error).removeprefix(f"{root / file}: ")))
    skipped += [(root / f, "not named in metadata.jsonl") for f in sorted(set(found) - {f for f, _ in rows})]
    if not kept:
        others = Counter(f.suffix.lower() or "extension-less" for f in files if f.suffix.lower() not in KINDS)
        holds = [f"{n} {kind}" for kind, n in others.most_common()] + [describe(Folder([], [], skipped, 0))]
        raise ValueError(f"no readable picture in {root}: it holds {', '.join(holds)}. Put png or jpg there")
    classes = sorted({f.parts[0] for f, _ in kept})
    if len(classes) == 1 or any(len(f.parts) == 1 for f, _ in kept):
        classes = []
    pictures = [Picture(root / f, text, classes.index(f.parts[0]) if classes else None) for f, text in kept]
    return Folder(pictures, classes, skipped, enlarged)


def describe(folder: Folder) -> str:
    """What `scan` found, in one line that names up to five of the skipped files."""
    pictures, classes, skipped, enlarged = folder
    n, captions = len(pictures), sum(p.text is not None for p in pictures)
    root = os.path.commonpath({p[0].parent for p in [*pictures, *skipped]} or ["."])
    names = ", ".join(f"{repr(os.path.relpath(path, root or '.'))[1:-1]} ({reason})" for path, reason in skipped[:5])
    names += f" and {len(skipped) - 5} more" * (len(skipped) > 5)
    text = f"{n} picture{'s' * (n != 1)}" + f" in {len(classes)} classes" * bool(classes)
    text += f", {captions} with text" * bool(captions) + f", {len(skipped)} skipped: {names}" * bool(skipped)
    return text + f"; {enlarged} smaller than the model's size, enlarged" * bool(enlarged)


def open_rgb(path: str | Path, keep_alpha: bool = False) -> Image.Image:
    """The picture (of an animation, the first frame), upright, in RGB on white, or in RGBA with its transparency.
    ValueError names an unreadable file."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("not a file that can be read from its start")
        with warnings.catch_warnings(record=True), Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)
        if max(picture.size) > (most := 16 * min(picture.size)):  # a strip, resized whole, could fill the memory
            picture = TF.center_crop(picture, [min(n, most) for n in reversed(picture.size)])  # its middle is used
        if picture.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        if picture.mode[0] == "I":  # 16-bit grey: 65535 / 257 = 255, where convert() clips most to white
            picture = picture.convert("I").point(lambda v: v * (1 / 257) + 0.5).convert("L").convert("RGB")
        if picture.mode[-1] in "Aa" or "transparency" in picture.info:  # on white, the page cut-outs are for
            picture = picture.convert("RGBA")
            page = Image.new("RGBA", picture.size, "white")
            picture = picture if keep_alpha else Image.alpha_composite(page, picture)
        return picture.convert("RGBA" if keep_alpha else "RGB")
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, MemoryError ...
        reason = ("truncated" if "truncated" in str(error).lower() else
                  "empty, or not a picture Pillow knows" if isinstance(error, UnidentifiedImageError) else
                  getattr(error, "strerror", None) or str(error) or type(error).__name__)
        raise ValueError(f"{path}: {reason}") from error


def to_square(picture: Image.Image, size: int) -> Tensor:
    """RGB picture -> (3 size size) in [-1, 1]: shorter side to `size` (bicubic, antialiased), centre crop."""
    picture = TF.center_crop(TF.resize(picture, size, TF.InterpolationMode.BICUBIC), size)
    return TF.pil_to_tensor(picture).float() / 127.5 - 1                                      # 3 size size


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
        if not (found := _read_metadata(Path(folder))):
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


def _read_metadata(root: Path) -> list[dict]:
    """The lines of metadata.jsonl, with "file" and "text" (which may be None) checked, and whatever else they hold."""
    rows, path = [], root / "metadata.jsonl"
    for i, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = Path(row["file"])
            if not isinstance(row.setdefault("text", None), str | None):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f'{path}:{i}: {line[:80]!r}, not {{"file": "a.jpg", "text": "a rose"}}') from error
        if file.is_absolute() or ".." in file.parts or not os.path.isfile(root / file):
            raise ValueError(f"{path}:{i}: {row['file']!r} is no file in {root}: mend the line or take it out")
        rows.append(row)
    return rows
