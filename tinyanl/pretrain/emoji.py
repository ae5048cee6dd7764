"""Rebuild the pictures that the embedded weights have seen from four npm packages.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 \
             emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    python -m tinyanl.pretrain.emoji ./emoji *.tgz

They become 2,974 cut-outs, in up to three styles, and metadata.jsonl. Left out: flags, symbols,
people and bodies, and everything that tells the time. Licences: assets/emoji64/README.md.
"""
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..runs import command, mistakes_in_one_line

STYLES = {  # name -> folder of the pictures in its package
    "fluent3d": "package/assets/",
    "noto": "package/img/google/64/",
    "twemoji": "package/img/twitter/64/",
}
TEXTS = {  # name -> file of emojibase-data
    "data": "package/en/data.json",
    "groups": "package/meta/groups.json",
}
GROUPS = {
    "smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects",
}
SIDE = 80  # pixels

Pictures = dict[tuple[str, str], bytes]  # style and code -> picture file


def emoji_code(name: str) -> str:
    """1F339, 1f339.webp, 0023-fe0f-20e3.png -> a name that all packages agree on."""
    return name.lower().split(".")[0].replace("-fe0f", "").lstrip("0")


def cut_out(data: bytes) -> Image.Image:
    """The drawing alone, in the middle of a transparent square."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    side = max(picture.size)
    square = Image.new("RGBA", (side, side))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def read_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of a .tgz. ValueError: it is none, or is cut short."""
    try:
        with tarfile.open(path) as archive:
            for member in tqdm(archive, path.name, leave=False):
                if member.isfile():
                    yield member.name, archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no .tgz file, or is cut short: get it anew") from error


def read_packages(paths: list[Path]) -> tuple[Pictures, dict[str, object]]:
    """Picture files of all styles, and the tables of TEXTS. ValueError: a package is missing or
    damaged."""
    pictures: Pictures = {}
    texts = {}
    for path in paths:
        for file, data in read_archive(path):
            for style, folder in STYLES.items():
                if file.startswith(folder):
                    pictures[style, emoji_code(Path(file).name)] = data
            for name, table in TEXTS.items():
                if file == table:
                    texts[name] = json.loads(data)
    found = {style for style, _ in pictures} | set(texts)
    missing = sorted({*STYLES, *TEXTS} - found)
    if missing:
        raise ValueError(f"the packages lack {', '.join(missing)}: name all four of them")
    return pictures, texts


def subgroup_of(emoji: dict, names: dict) -> tuple[str | None, str | None]:
    """Names of the group and subgroup of an entry of emojibase-data; None where it has none."""
    group = names["groups"].get(str(emoji.get("group")))
    subgroup = names["subgroups"].get(str(emoji.get("subgroup")))
    return group, subgroup


def build(folder: Path, packages: list[Path]) -> int:
    """Write the pictures and metadata.jsonl to `folder` -> how many there are."""
    pictures, texts = read_packages(packages)
    rows = []
    for emoji in tqdm(texts["data"], "cutting out"):
        group, subgroup = subgroup_of(emoji, texts["groups"])
        if group not in GROUPS or subgroup == "time":
            continue
        for style in STYLES:
            data = pictures.get((style, emoji_code(emoji["hexcode"])))
            if data is None:
                continue
            file = Path(style, f"{emoji['hexcode'].lower()}.webp")
            (folder / style).mkdir(parents=True, exist_ok=True)
            cut_out(data).save(folder / file, lossless=True)
            rows.append(
                {
                    "file": file.as_posix(),
                    "label": emoji["label"],
                    "tags": emoji.get("tags", []),
                    "style": style,
                    "group": group,
                    "subgroup": subgroup,
                }
            )
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(rows)


def main(argv: list[str] | None = None) -> None:
    p = command("pretrain.emoji", __doc__)
    p.add_argument("folder", type=Path, help="new folder to write to")
    p.add_argument("packages", type=Path, nargs="+", help="the four .tgz files")
    args = p.parse_args(argv)
    with mistakes_in_one_line(p):
        print(f"{build(args.folder, args.packages)} pictures are in {args.folder}")


if __name__ == "__main__":
    main()
