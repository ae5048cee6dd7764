"""A folder of images -> verified pictures, captions and labels.

    DIR/*.jpg                        pictures, at any depth, sorted by path so that runs repeat
    DIR/cats/*.jpg DIR/dogs/*.jpg    every picture in one of two or more first-level sub-folders: classes
    DIR/metadata.jsonl               lines of {"file": "a.jpg", "text": "a rose"}: these files, in this order

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
import hashlib
import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torchvision.transforms.functional as TF
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

# where Pillow cannot read avif or heic they are named among the skipped, not passed over in silence
KINDS = {f".{k}" for k in "png jpg jpeg jfif webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif heic heif".split()}


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
        rows = [(Path(row["file"]), row["text"]) for row in read_metadata(root)]
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


def read_metadata(root: Path) -> list[dict]:
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


def file_identity(path: str | Path) -> str:
    """Size in bytes and a hash of the first 64 KiB, such as "5120 9f86d081884c7d65".

    Two pictures of one name and two identities are different pictures. What lies behind the first
    64 KiB is not read, so that 200,000 pictures take seconds and not minutes. OSError: unreadable."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        beginning = file.read(1 << 16)
    return f"{size} {hashlib.sha256(beginning).hexdigest()[:16]}"
