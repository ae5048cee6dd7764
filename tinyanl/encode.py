"""Pictures and prompts become what the models work on: latents of the first stage, and unit embeddings of CLIP.

Both depend on a picture alone, so they are computed once, with its mirror image, and kept: in memory, or, past 4 GiB
(CelebA's 200,000 pictures at 256 pixels take 19), in mapped files. N pictures or texts, B batch, C h w latent, D CLIP
embedding width, S picture side, R CLIP's picture side.
"""
import hashlib
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from .data import open_rgb, to_square
from .models import Base
from .runs import save

IN_MEMORY = 2**32  # bytes of latents and embeddings; more are kept in mapped files
SAVE_EVERY = 100  # batches of pictures that are encoded into such files
NEUTRAL = ("", "a picture", "a photo", "a drawing")  # stand-ins for the average caption where a data set has none


@torch.no_grad()
def encode(base: Base, paths: list[Path], batch: int = 16, cache: Path | None = None,
           latents: bool = True) -> tuple[Tensor | None, Tensor]:
    """Pictures, as they are and mirrored -> latents (N 2 C h w), if wanted, and unit CLIP image embeddings (N 2 D), on
    the CPU. Those of more than IN_MEMORY bytes become files in the folder `cache`, mapped into memory; when a call was
    stopped, the next one for the same pictures and weights goes on."""
    shapes = {"latents": (len(paths), 2, *base.latent_shape)} if latents else {}
    shapes["embeddings"], numbers, progress, start = (len(paths), 2, base.clip.dim), {}, None, 0
    if cache and 4 * sum(map(math.prod, shapes.values())) > IN_MEMORY:
        cache.mkdir(parents=True, exist_ok=True)
        files = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in paths]
        of = hashlib.sha256(json.dumps([*base.fingerprints().values(), *files]).encode()).hexdigest()
        progress = cache / "progress.json"
        kept = json.loads(progress.read_text()) if progress.exists() else {}
        start = kept.get("done", 0) if kept.get("of") == of else 0
    for name, shape in shapes.items():
        n = math.prod(shape)
        numbers[name] = (torch.from_file(str(cache / name), True, n) if progress else torch.empty(n)).view(shape)
    ways = {"latents": (lambda picture: to_square(picture, base.size), base.autoencoder.encode),
            "embeddings": (base.clip.preprocess, lambda x: F.normalize(base.clip.encode_image(x), dim=-1))}
    for i in tqdm(range(start, len(paths), batch), "encoding", leave=False, delay=2, unit_scale=batch, unit="img"):
        part = slice(i, i + batch)
        pictures = [open_rgb(path) for path in paths[part]]
        for name in shapes:
            look, model = ways[name]
            x = torch.stack([look(picture) for picture in pictures]).to(base.device)          # B 3 S S or B 3 R R
            for j, view in enumerate((x, x.flip(-1))):
                numbers[name][part, j] = model(view).cpu()
        for path, *own in zip(paths[part], *(x[part] for x in numbers.values())):
            if not all(x.isfinite().all() for x in own):
                raise ValueError(f"{path} becomes numbers that are not finite: are the weights damaged? ({base.name})")
        if progress and (i // batch % SAVE_EVERY == SAVE_EVERY - 1 or i + batch >= len(paths)):
            for name in shapes:  # what is counted as done must be on the disk, should the power fail
                with open(cache / name, "r+b") as file:
                    os.fsync(file.fileno())
            save(json.dumps({"of": of, "done": i + batch}), progress)
    return numbers.get("latents"), numbers["embeddings"]


@torch.no_grad()
def embed_pictures(base: Base, x: Tensor, batch: int = 64) -> Tensor:
    """Pictures (N 3 S S) uint8 -> unit CLIP embeddings (N D) on the CPU, through CLIP's own preprocessing."""
    views = (torch.stack([base.clip.preprocess(to_pil_image(picture)) for picture in part]) for part in x.split(batch))
    return F.normalize(torch.cat([base.clip.encode_image(view.to(base.device)).cpu() for view in views]), dim=-1)


@torch.no_grad()
def embed_texts(base: Base, texts: list[str], cut: bool = False, batch: int = 256) -> Tensor:
    """Prompts -> unit CLIP text embeddings (N D), on the CPU. What exceeds CLIP's context is cut, or a ValueError."""
    tokens = base.tokenizer(texts, base.clip.context_length, cut).to(base.device)
    return F.normalize(torch.cat([base.clip.encode_text(part) for part in tokens.split(batch)]), dim=-1).cpu()
