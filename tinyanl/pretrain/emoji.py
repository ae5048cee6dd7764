"""Rebuild the source pictures of the embedded weights from four npm packages: 2,974 cut-outs and metadata.jsonl.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \
             emojibase-data@17.0.0
    python -m tinyanl.pretrain.emoji ./emoji *.tgz

Needs pillow and tqdm. Left out: flags, symbols, people and bodies, and everything that tells the time. Licences of the
pictures: emoji64/README.md.
"""
import argparse
import io
import json
import tarfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

STYLES = {"fluent3d": "package/assets/", "noto": "package/img/google/64/", "twemoji": "package/img/twitter/64/"}
GROUPS = {"smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"}


def code(name: str) -> str:
    """1F339, 1f339.webp, 0023-fe0f-20e3.png -> a name that all packages agree on."""
    return name.lower().split(".")[0].replace("-fe0f", "").lstrip("0")


def cut_out(data: bytes, side: int = 80) -> Image.Image:
    """The drawing alone, in the middle of a transparent square."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    square = Image.new("RGBA", (max(picture.size),) * 2)
    square.paste(picture, tuple((square.width - length) // 2 for length in picture.size))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="new folder to write to")
    p.add_argument("packages", type=Path, nargs="+", help="the four .tgz files")
    args = p.parse_args()
    pictures, texts = {}, {}
    for path in args.packages:
        with tarfile.open(path) as archive:
            for member in tqdm(archive, path.name):
                style = next((style for style, start in STYLES.items() if member.name.startswith(start)), None)
                if style:
                    pictures[style, code(Path(member.name).name)] = archive.extractfile(member).read()
                elif member.name in ("package/en/data.json", "package/meta/groups.json"):
                    texts[Path(member.name).stem] = json.load(archive.extractfile(member))
    if len(texts) < 2 or {style for style, _ in pictures} != set(STYLES):
        raise SystemExit(f"found {sorted({style for style, _ in pictures} | set(texts))}: name all four packages")
    names, lines = texts["groups"], []
    for emoji in tqdm(texts["data"], "cutting out"):
        group, subgroup = (names[kind].get(str(emoji.get(kind[:-1]))) for kind in ("groups", "subgroups"))
        if group not in GROUPS or subgroup == "time":
            continue
        for style in STYLES:
            if data := pictures.get((style, code(emoji["hexcode"]))):
                file = Path(style, f"{emoji['hexcode'].lower()}.webp")
                (args.folder / style).mkdir(parents=True, exist_ok=True)
                cut_out(data).save(args.folder / file, lossless=True)
                lines.append({"file": file.as_posix(), "label": emoji["label"], "tags": emoji.get("tags", []),
                              "style": style, "group": group, "subgroup": subgroup})
    (args.folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} pictures are in {args.folder}")


if __name__ == "__main__":
    main()
