"""Small data sets to transfer to: cut-outs of a family, on the backgrounds of drawn flowers."""
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from ..flowers import BACKGROUNDS, background, save
from .art import read_art
from .training import SIZE

# name -> how the subgroups of its pictures begin; the U-Net is pretrained without all of them
FAMILIES = {"flowers": "plant-flower", "faces": "face-", "vehicles": "transport-ground"}


def paste_cut_out(path: Path, words: str, size: int, rng: random.Random) -> Image.Image:
    """A cut-out, at a random place and size, before the background that `words` name."""
    page_side = 4 * size  # pasted four times as large, for smooth edges
    side = rng.randint(3 * size, page_side)
    page = background(words, rng, page_side, hue=rng.random())
    cut_out = Image.open(path).convert("RGBA")
    cut_out = ImageOps.pad(cut_out, (side, side), color=(0, 0, 0, 0))
    left = rng.randint(0, page_side - side)
    top = rng.randint(0, page_side - side)
    page.paste(cut_out, (left, top), cut_out)
    return page.resize((size, size), Image.Resampling.LANCZOS)


def place(rows: list[dict], folder: Path, size: int = 64, seed: int = 0) -> None:
    """Write a data set like that of tinyanl.flowers, of other things, to a new folder.

    rows: "path", "label" and "subgroup" of the cut-outs. The same seed and folder name give the
    same pictures. FileExistsError if the folder is not empty."""
    rng = random.Random(f"{folder.name} {seed}")

    def pictures() -> Iterator[tuple[Image.Image, dict]]:
        for row in rows:
            words = rng.choice(list(BACKGROUNDS))
            picture = paste_cut_out(row["path"], words, size, rng)
            yield picture, {
                "text": f"a {row['label']} {words}",
                "tags": [row["label"]],
                "subgroup": row["subgroup"],
            }

    save(folder, pictures(), len(rows))


def write_families(data: list[Path], out: Path, seed: int) -> dict[str, int]:
    """Write out/faces and out/vehicles, pictures with captions to transfer to."""
    rows = read_art(data).rows
    figures = {}
    for name in ("faces", "vehicles"):
        found = [row for row in rows if row["subgroup"].startswith(FAMILIES[name])]
        place(found, out / name, SIZE, seed)
        figures[f"pictures in {out / name}"] = len(found)
    return figures
