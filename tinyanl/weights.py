"""Released weights: where they are, how they are licensed; fetches them, and says what a file is.

    python -m tinyanl.weights                                              the table
    python -m tinyanl.weights get imagenet256 --to weights/imagenet256     the paper's set
    python -m tinyanl.weights check weights/imagenet256                    what its files are

Nothing is downloaded unless `get` is asked for it.
"""
import os
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

from .checkpoint import FID, SIZES, load_checkpoint, refuse_bomb
from .download import fetch, part_of, sha256_of
from .identify import (
    IGNORED,
    Found,
    build,
    candidates,
    identify,
    inspect,
    null_class_warning,
)
from .runs import command, mistakes_in_one_line

__all__ = ["TABLE", "Found", "File", "check", "get", "identify", "inspect", "load_checkpoint"]


class File(NamedTuple):
    """A released file. bytes and sha256 are None where they were never published; saved_as is its
    place in a weights folder; what has .zip in its address is an archive that holds one .ckpt."""

    name: str
    urls: tuple[str, ...]
    saved_as: str
    licence: str
    loader: str
    bytes: int | None = None
    sha256: str | None = None


LDM = "https://ommer-lab.com/files/latent-diffusion/"
CLIP = "https://openaipublic.azureedge.net/clip/models/"
GITHUB = "https://github.com/"
HUB = "https://huggingface.co/"
CELEBAHQ = f"{HUB}CompVis/ldm-celebahq-256/resolve/main/"
MERGES = "bpe_simple_vocab_16e6.txt.gz"
MIT = "MIT (code; none stated for the weights)"
CLIP_MIT = "MIT; model card: any deployed use is out of scope"
CLIP_HUB = "Apache-2.0 (tag of the page); model card: any deployed use is out of scope"
APACHE = "Apache-2.0"
BASE = "unet.UNet, autoencoder.Autoencoder"
FIRST_STAGE = "autoencoder.Autoencoder"


def openai_clip(name: str, sha256: str) -> File:
    """The row of an OpenAI CLIP: the folder of its file is called by its SHA-256."""
    file = name.replace("/", "-") + ".pt"
    url = f"{CLIP}{sha256}/{file}"
    return File(f"CLIP {name}", (url,), file, CLIP_MIT, "clip.CLIP", sha256=sha256)


TABLE = (
    File(
        "LDM cin256-v2",
        (f"{LDM}nitro/cin/model.ckpt",),
        "model.ckpt",
        MIT,
        f"{BASE}: the paper's base",
    ),
    File("LDM celeba256", (f"{LDM}celeba.zip",), "celeba256.ckpt", MIT, BASE),
    File("LDM ffhq256", (f"{LDM}ffhq.zip",), "ffhq256.ckpt", MIT, BASE),
    File(
        "LDM cin256 f8",
        (f"{LDM}cin.zip",),
        "cin256-f8.ckpt",
        MIT,
        f"{BASE}: NOT the paper's base, only called alike, and without a null class",
    ),
    File("VQ-f4", (f"{LDM}vq-f4.zip",), "vq-f4.ckpt", MIT, FIRST_STAGE),
    File("VQ-f8", (f"{LDM}vq-f8.zip",), "vq-f8.ckpt", MIT, FIRST_STAGE),
    File("KL-f8", (f"{LDM}kl-f8.zip",), "kl-f8.ckpt", MIT, FIRST_STAGE),
    File(
        "celebahq256 U-Net",
        (f"{CELEBAHQ}unet/diffusion_pytorch_model.bin",),
        "unet/diffusion_pytorch_model.bin",
        APACHE,
        "unet.UNet, by layouts.py",
    ),
    File(
        "celebahq256 U-Net's config",
        (f"{CELEBAHQ}unet/config.json",),
        "unet/config.json",
        APACHE,
        "identify.py",
    ),
    File(
        "celebahq256 first stage",
        (f"{CELEBAHQ}vqvae/diffusion_pytorch_model.bin",),
        "vqvae/diffusion_pytorch_model.bin",
        APACHE,
        "autoencoder.Autoencoder, by layouts.py",
        sha256="051f55600f2ae1a018b1c1e4c7e3c7ac81aaff9bb1cb35bb646aed1e30e16ad3",
    ),
    File(
        "celebahq256 first stage's config",
        (f"{CELEBAHQ}vqvae/config.json",),
        "vqvae/config.json",
        APACHE,
        "identify.py",
    ),
    File(
        "celebahq256 schedule",
        (f"{CELEBAHQ}scheduler/scheduler_config.json",),
        "scheduler/scheduler_config.json",
        APACHE,
        "identify.py",
    ),
    openai_clip("ViT-B/32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    openai_clip("ViT-B/16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    openai_clip("ViT-L/14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    File(
        "CLIP ViT-B/32, transformers",
        (f"{HUB}openai/clip-vit-base-patch32/resolve/main/pytorch_model.bin",),
        "clip-vit-base-patch32.bin",
        CLIP_MIT,
        "clip.CLIP",
    ),
    File(
        "CLIP ViT-B/32, open_clip",
        (f"{HUB}timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors",),
        "vit_base_patch32_clip_224.safetensors",
        CLIP_HUB,
        "clip.CLIP (needs pip install safetensors)",
    ),
    File(
        "BPE merges",
        (f"{GITHUB}openai/CLIP/raw/main/clip/{MERGES}",),
        MERGES,
        "MIT",
        "tokenizer.Tokenizer",
        SIZES[MERGES],
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
    ),
    File(
        "FID Inception",
        (
            f"{GITHUB}mseitzer/pytorch-fid/releases/download/fid_weights/pt_{FID}",
            f"{GITHUB}toshas/torch-fidelity/releases/download/v0.2.0/weights-{FID}",
        ),
        f"pt_{FID}",
        "Apache-2.0 (code)",
        "metrics",
        SIZES[f"pt_{FID}"],
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
)
SETS = {  # what --weights needs, under one name
    "imagenet256": ("LDM cin256-v2", "CLIP ViT-B/32", "BPE merges"),
    "celebahq256": (
        *(file.name for file in TABLE if file.name.startswith("celebahq256")),
        "CLIP ViT-B/32",
        "BPE merges",
    ),
}


def rows(names: list[str]) -> list[File]:
    """The rows of the table that sets and names of rows mean, each once. ValueError: there is no
    such name."""
    by_name = {file.name.lower(): file for file in TABLE}
    wanted = []
    for name in names:
        for row in SETS.get(name, (name,)):
            if row.lower() not in by_name:
                raise ValueError(f"{row!r} is not in the table: choose from {', '.join(SETS)}, "
                                 f"{', '.join(repr(file.name) for file in TABLE)}")
            wanted.append(by_name[row.lower()])
    return list(dict.fromkeys(wanted))


def get(names: list[str], folder: Path) -> bool:
    """Fetch rows of the table into a weights folder and print what `check` says of each; True if
    nothing is wrong with any.

    What is there already stays. ValueError: no such row. OSError: a file cannot be had, and why;
    those before it are there, and what has arrived of it is kept for the next attempt."""
    files = rows(names)
    for file in files:
        path = folder / file.saved_as
        if path.exists():
            print(f"{path} is there already")
        else:
            print(f"{file.name}, licence {file.licence}\n    to {path}")
            get_file(file, path)
    paths = [folder / file.saved_as for file in files]
    checks = [check(path) for path in paths]
    return all(checks)


def get_file(file: File, path: Path) -> None:
    """Download one row, and unpack it where it is an archive."""
    if not file.urls[0].endswith(".zip"):
        fetch(file.urls, path, file.bytes, file.sha256)
        return
    archive = path.with_suffix(".zip")
    if not archive.exists():
        fetch(file.urls, archive, file.bytes, file.sha256)
    unpack(archive, path)
    archive.unlink()


def unpack(archive: Path, path: Path) -> None:
    """Write the one .ckpt of an archive to `path`, whole or not at all. ValueError: it has none, or
    is damaged. OSError: the disk is full."""
    part = part_of(path)
    try:
        refuse_bomb(archive)
        with zipfile.ZipFile(archive) as packed:
            inside = [name for name in packed.namelist() if name.endswith(".ckpt")]
            if len(inside) != 1:
                raise ValueError(f"{archive} holds {packed.namelist()[:5]}, not one .ckpt: unzip "
                                 "it by hand")
            with packed.open(inside[0]) as source, open(part, "wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
    except zipfile.BadZipFile as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{archive} is damaged ({error}): delete it and get it again") from error
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OSError(f"{archive} cannot be unpacked ({error}): make room, and the same command "
                      "goes on there") from error
    os.replace(part, path)


def examine(path: Path) -> tuple[Found, str | None]:
    """What a file is, with a problem also where its parts do not load or it cannot be read; and
    what to know before using it."""
    try:
        found, state = inspect(path)
    except (OSError, ValueError) as error:
        return Found("not readable", (), str(error)), None
    try:
        for part in found.parts:
            if part != "inception" and found.problem is None:
                build(path, part, state)
    except ValueError as error:
        found = found._replace(problem=str(error))
    return found, null_class_warning(state)


def check(path: Path) -> bool:
    """Print what a file is, its size, its SHA-256 and what is wrong with it; True if nothing is. Of
    a folder: of every file that --weights would look into."""
    if path.is_dir():
        files = candidates(path)
        if not files:
            print(f"{path}\n  what     a folder without files for --weights")
        checks = [check(file) for file in files]
        return all(checks)
    if path.is_file() and path.suffix in IGNORED:
        print(f"{path}\n  what     settings or text, not weights: passed over")
        return True
    found, warning = examine(path)
    print(f"{path}\n  what     {found.name}")
    if path.is_file() and os.access(path, os.R_OK):
        sha256 = sha256_of(path)
        print(f"  size     {path.stat().st_size:,} bytes")
        print(f"  SHA-256  {sha256}")
        print(f"           {compare_hash(sha256, found)}")
    if warning:
        print(f"  warning  {warning}")
    print(f"  problem  {found.problem or 'none'}")
    return found.problem is None


def compare_hash(sha256: str, found: Found) -> str:
    """What is published about the hash of a file that is `found`."""
    published = {file.sha256: file.name for file in TABLE if file.sha256}
    if sha256 in published:
        return f"matches {published[sha256]}"
    kind = re.split("[:,]", found.name)[0]
    if kind in published.values():
        return f"is not the published hash of {kind}: another container, or other contents"
    return "no hash is published for this file"


def print_released_files() -> None:
    for file in TABLE:
        size = f"{file.bytes:,} bytes" if file.bytes else "size not published"
        print(file.name)
        for url in file.urls:
            print(f"    {url}")
        print(f"    {size}, SHA-256 {file.sha256 or 'not published'}")
        print(f"    licence {file.licence}")
        print(f"    read by {file.loader}")
    print("\nNothing is downloaded for you but by\n"
          "    python -m tinyanl.weights get imagenet256 --to weights/imagenet256\n"
          f"which fetches the paper's set. {', '.join(SETS)} are sets; every name above will\n"
          "do, too. Names of files are free: they are known by what is inside. weights.md says "
          "more.")


def main(argv: list[str] | None = None) -> int:
    p = command("weights", __doc__)
    p.add_argument("command", nargs="?", choices=["get", "check"], help="without: print the table")
    p.add_argument("names", nargs="*", help="get: sets, or rows of the table; check: files")
    p.add_argument("--to", type=Path, help="get: the folder they go into (weights/ and the set)")
    args = p.parse_args(argv)
    if args.command == "get" and not args.names:
        p.error(f"get what? {', '.join(SETS)}, or rows of the table")
    if args.command == "check" and not args.names:
        p.error("check which files or folders?")
    stopped = "stopped: what has arrived is kept, and the same command goes on there"
    with mistakes_in_one_line(p, stopped):
        if args.command == "check":
            checks = [check(Path(name)) for name in args.names]
            return 0 if all(checks) else 1
        if args.command == "get":
            is_one_set = len(args.names) == 1 and args.names[0] in SETS
            if args.to is None and not is_one_set:
                p.error("get these into which folder? --to DIR")
            return 0 if get(args.names, args.to or Path("weights") / args.names[0]) else 1
        print_released_files()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
