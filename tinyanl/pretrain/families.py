"""Small data sets to transfer to: cut-outs of one family, on the backgrounds of the drawn flowers."""
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageOps

from ..flowers import BACKGROUNDS, background, save

# name -> how the subgroups of its pictures begin; the U-Net is pretrained without all of them
FAMILIES = {"flowers": "plant-flower", "faces": "face-", "vehicles": "transport-ground"}


def paste_cut_out(path: Path, words: str, size: int, rng: random.Random) -> Image.Image:
    """A cut-out, at a random place and size, before the background that `words` of BACKGROUNDS name."""
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

    rows: "path", "label" and "subgroup" of the cut-outs. The same seed and name of the folder give
    the same pictures. FileExistsError if the folder is not empty."""
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
