"""Released weights: where they are, how they are licensed, and what a file turns out to be.

Files are known by the tensors inside them, never by their names. checkpoint.py reads them: copy both into one package.
"""
import argparse
import gzip
import hashlib
import math
import os
import re
import signal
import zlib
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .checkpoint import FID, SIZES, load_checkpoint, unreadable


class File(NamedTuple):
    """A released file; bytes and sha256 are None where they were never published."""
    name: str
    urls: tuple[str, ...]
    bytes: int | None
    sha256: str | None
    licence: str
    loader: str


LDM, CLIP = "https://ommer-lab.com/files/latent-diffusion/", "https://openaipublic.azureedge.net/clip/models/"
GITHUB, MERGES = "https://github.com/", "bpe_simple_vocab_16e6.txt.gz"
MIT, CLIP_MIT = "MIT (code; none stated for the weights)", "MIT; model card: any deployed use is out of scope"
BASE, FIRST = "unet.UNet, autoencoder.Autoencoder", "autoencoder.Autoencoder (unzip first)"
TABLE = (
    File("LDM cin256-v2", (LDM + "nitro/cin/model.ckpt",), None, None, MIT, BASE + ": the paper's base"),
    File("LDM celeba256", (LDM + "celeba.zip",), None, None, MIT, BASE + " (unzip first; head_channels=32)"),
    File("LDM ffhq256", (LDM + "ffhq.zip",), None, None, MIT, BASE + " (unzip first; head_channels=32)"),
    File("LDM cin256 f8", (LDM + "cin.zip",), None, None, MIT, "none: NOT the paper's base, only called alike"),
    *(File(f, (f"{LDM}{f.lower()}.zip",), None, None, MIT, FIRST) for f in ("VQ-f4", "VQ-f8", "KL-f8")),
    *(File(f"CLIP {name}", (f"{CLIP}{sha}/{name.replace('/', '-')}.pt",), None, sha, CLIP_MIT, "clip.CLIP")
      for name, sha in (("ViT-B/32", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
                        ("ViT-B/16", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
                        ("ViT-L/14", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"))),
    File("BPE merges", (f"{GITHUB}openai/CLIP/raw/main/clip/{MERGES}",), SIZES[MERGES],
         "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a", "MIT", "tokenizer.Tokenizer"),
    File("FID Inception", (f"{GITHUB}mseitzer/pytorch-fid/releases/download/fid_weights/pt_{FID}",
                           f"{GITHUB}toshas/torch-fidelity/releases/download/v0.2.0/weights-{FID}"), SIZES[f"pt_{FID}"],
         "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", "Apache-2.0 (code)", "metrics"))


class Found(NamedTuple):
    """What a file is; which of unet, autoencoder, classes, clip, merges, inception it holds; what is wrong."""
    name: str
    parts: tuple[str, ...]
    problem: str | None = None


_LDMS = {(192, 512, 1001): "cin256-v2", (256, 512, 1000): "cin256 f8", (192, 640, None): "text2img256",
         (224, None, None): "celeba256 or ffhq256"}  # channels, context, classes
_VITS = {(224, 32, 768, 512): "ViT-B/32", (224, 16, 768, 512): "ViT-B/16", (224, 14, 1024, 768): "ViT-L/14",
         (336, 14, 1024, 768): "ViT-L/14@336px"}  # pixels, patch, width, embedding


def identify(state: dict[str, Tensor]) -> Found:
    """What a state dict is, by names and shapes alone: tensors on the meta device will do."""
    s = {k: tuple(v.shape) for k, v in state.items()}
    try:
        if found := _ldm(s) or _clip(s):
            odd = next((k for k, v in state.items() if k.endswith("weight") and not v.is_floating_point()), None)
            return found._replace(problem=f"{odd} holds {state[odd].dtype}: get the file that is not quantised"
                                  ) if odd else found
    except (LookupError, TypeError, ValueError) as error:
        return Found("part of an LDM or CLIP", (), f"a tensor is missing or misshapen: {error!r}; get the whole file")
    if s.get("fc.weight") == (1008, 2048) and "Mixed_7c.branch_pool.conv.weight" in s:
        return Found("FID Inception", ("inception",))
    keys = ", ".join(list(s)[:4])
    return Found("unknown", (), f"no file that tinyanl reads has the keys {keys} ... (diffusers' layout and "
                                "torchvision's Inception are not read): see python -m tinyanl.weights")


def _ldm(s: dict[str, tuple[int, ...]]) -> Found | None:
    def under(prefix: str) -> dict[str, tuple[int, ...]]:
        return {k.removeprefix(prefix): v for k, v in s.items() if k.startswith(prefix)}

    unet, classes = under("model.diffusion_model."), s.get("cond_stage_model.embedding.weight", (None,))[0]
    stage = {k: v for k, v in (under("first_stage_model.") or s).items() if not k.startswith("loss.")}
    size, first = f"{sum(map(math.prod, (unet or stage).values())):,} parameters", None
    if "encoder.conv_in.weight" in stage:
        codes = stage.get("quantize.embedding.weight")
        levels = {k.split(".")[2] for k in stage if k.startswith("encoder.down.")}
        first = f"{'VQ' if codes else 'KL'}-f{2 ** len(levels) // 2}"
    if not unet:
        book = f", {codes[0]} codes of {codes[1]} numbers" if first and codes else ""
        return Found(f"{first}: {size}{book}", ("autoencoder",)) if first else None
    channels, inputs, *_ = unet["input_blocks.0.0.weight"]
    context = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (0, None))[1]
    scaled = unet["input_blocks.1.0.emb_layers.1.weight"][0] > unet["input_blocks.1.0.out_layers.3.weight"][0]
    problem = next((text for wrong, text in (
        (classes == 1000, "has no null class among its 1000, so it cannot run without a class (cin256 f8)"),
        (not classes and under("cond_stage_model."), "is conditioned on more than classes (text2img256)"),
        (scaled, "scales and shifts by the time, which is not supported (lsun_churches256)"),
        (inputs != unet["out.2.weight"][0], f"takes {inputs} channels (inpainting, super-resolution)"),
        (any(".transformer_blocks.1." in k for k in unet), "has two transformers in a row")) if wrong), None)
    which = _LDMS.get((channels, context, classes), f"({channels} channels, context {context})")
    name = f"LDM {which}: U-Net {size}", first, classes and f"{classes} classes", under("model_ema.") and "EMA"
    parts = [part for part, there in (("unet", True), ("autoencoder", first), ("classes", classes)) if there]
    return Found(", ".join(filter(None, name)), tuple(parts), problem and
                 f"this U-Net {problem}: you want cin256-v2, nitro/cin/model.ckpt (python -m tinyanl.weights)")


def _clip(s: dict[str, tuple[int, ...]]) -> Found | None:
    if "visual.layer1.0.conv1.weight" in s:
        return Found("CLIP ResNet", ("clip",), "a ResNet CLIP is not supported: use ViT-B/32 or another ViT")
    hugging = any(k.startswith(("vision_model.", "text_model.")) for k in s)
    conv, positions, proj, words = (
        ("vision_model.embeddings.patch_embedding.weight", "vision_model.embeddings.position_embedding.weight",
         "visual_projection.weight", "text_model.embeddings.token_embedding.weight") if hugging else
        ("visual.conv1.weight", "visual.positional_embedding", "visual.proj", "token_embedding.weight"))
    if not {conv, words} & s.keys():
        return None
    (width, _, _, patch), tokens, dim, _ = s[conv], s[positions][0], s[proj][0 if hugging else 1], s[words]
    sizes = (patch * math.isqrt(tokens - 1), patch, width, dim)
    name = _VITS.get(sizes, "ViT ({} px, patch {}, width {}, embedding {})".format(*sizes))
    return Found(f"CLIP {name}" + ", Hugging Face keys" * hugging, ("clip",))


def inspect(path: str | Path) -> tuple[Found, dict[str, Tensor]]:
    """What a file is, and its tensors: {} for BPE merges. Errors as in load_checkpoint."""
    path, lines = Path(path), []
    if path.is_file():
        with open(path, "rb") as file:
            start = file.read(2)
        try:
            with (gzip.open if start == b"\x1f\x8b" else open)(path, "rb") as file:
                lines = file.read(1 << 23).splitlines() if b"#version" in file.readline(200) else []
        except (EOFError, OSError, zlib.error) as error:
            raise unreadable(path, f"is cut off or damaged ({error})") from error
    if lines and all(len(line.split()) == 2 for line in lines[:1000]):
        return Found(f"BPE merges, {len(lines):,} lines", ("merges",)), {}
    state = load_checkpoint(path)
    return identify(state), state


def check(path: Path) -> bool:
    """Print what a file is, its size, its SHA-256 and what is wrong with it; True if nothing is."""
    try:
        found = inspect(path)[0]
    except (OSError, ValueError) as error:
        found = Found("not readable", (), str(error))
    print(f"{path}\n  what     {found.name}")
    if path.is_file() and os.access(path, os.R_OK):
        sha = hashlib.sha256()
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
        kind, known = re.split("[:,]", found.name)[0], {f.sha256: f.name for f in TABLE if f.sha256}
        verdict = "no hash is published for this file"
        if kind in known.values():
            verdict = f"is not the published hash of {kind}: another container, or other contents"
        if sha.hexdigest() in known:
            verdict = f"matches {known[sha.hexdigest()]}"
        print(f"  size     {path.stat().st_size:,} bytes\n  SHA-256  {sha.hexdigest()}\n           {verdict}")
    print(f"  problem  {found.problem or 'none'}")
    return found.problem is None


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m tinyanl.weights", description="List released files, or check some.")
    p.error = lambda message: p.exit(2, f"{p.prog}: {message}\n")
    p.add_argument("command", nargs="?", choices=["check"], help="without it: print the list")
    p.add_argument("files", nargs="*", type=Path, help="files to check")
    args = p.parse_args(argv)
    if args.command:
        return 0 if all([check(path) for path in args.files or p.error("check which files?")]) else 1
    for f in TABLE:
        size = f"{f.bytes:,} bytes" if f.bytes else "size not published"
        print(f.name, *f.urls, f"{size}, SHA-256 {f.sha256 or 'not published'}",
              f"licence {f.licence}", f"read by {f.loader}", sep="\n    ")
    print("\nNothing is downloaded for you: fetch the files and put them in one folder for --weights, as in\n"
          "    weights/imagenet256/{model.ckpt, ViT-B-32.pt, bpe_simple_vocab_16e6.txt.gz}\n"
          "Their names are free: files are known by what is inside. weights.md says more.")
    return 0


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # Windows has none
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` leaves early: end without a word
    raise SystemExit(main())
