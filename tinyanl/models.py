"""Assembly: a weights folder becomes a frozen base, a run folder becomes a trained model.

The files of a weights folder are known by the keys inside them, never by name. One folder holds an LDM (U-Net, first
stage and class embedding, in one file or several), a CLIP and its BPE merges; the embedded default in assets/emoji64 is
such a folder. B batch, N pictures, C h w latent, D CLIP embedding width, S picture side, R CLIP's picture side.
"""
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .anl import ANLs
from .autoencoder import Autoencoder
from .clip import CLIP
from .data import open_rgb, to_square
from .tokenizer import Tokenizer
from .unet import UNet
from .weights import inspect

EMBEDDED = Path(__file__).parent / "assets" / "emoji64"
NEUTRAL = ("", "a picture", "a photo", "a drawing")  # stand-ins for the average caption where a data set has none


@dataclass
class Base:
    """The frozen models. `null` (1 1 M) is the embedding of "no class", None where the U-Net takes no context."""

    unet: UNet
    autoencoder: Autoencoder
    clip: CLIP
    tokenizer: Tokenizer
    null: Tensor | None
    size: int
    device: torch.device
    name: str

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = self.size // self.autoencoder.factor
        return self.unet.in_channels, side, side

    def fingerprints(self) -> dict[str, str]:
        """What an adapter must find again to mean the same: hashes of the U-Net, the first stage and CLIP."""
        return {part: fingerprint(getattr(self, part)) for part in ("unet", "autoencoder", "clip")}


def generator(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of a training step, on the CPU: a resumed run needs no random states."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def pick_device(device: str | None = None) -> torch.device:
    """The device named, else CUDA, else MPS, else the CPU."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(device or found)


def load_base(weights: str | Path | None = None, device: str | None = None) -> Base:
    """Load and freeze the models of a weights folder (None: the embedded default).

    FileNotFoundError: no such folder. ValueError: a part is missing, there twice or unfit; it lists what was found."""
    folder, device = Path(weights or EMBEDDED), pick_device(device)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder of weights: see weights.md for what goes into one")
    parts: dict[str, tuple[Path, dict[str, Tensor]]] = {}
    seen, wrong = [], []
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.suffix != ".md" and p.name[0] != "."):
        found, state = inspect(path)
        seen.append(f"{path.name}: {found.name}")
        if found.problem:
            raise ValueError(f"{path}: {found.name}. {found.problem}")
        for part in found.parts:
            if part in parts:
                wrong.append(f"{part} is in both {parts[part][0].name} and {path.name}")
            parts[part] = (path, state)
    wrong += [f"{part} is missing" for part in ("unet", "autoencoder", "clip", "merges") if part not in parts]
    if wrong:
        raise ValueError(f"{folder}: {', '.join(wrong)}. Found: {'; '.join(seen) or 'nothing'}. See weights.md")

    state = parts["unet"][1]
    conditional = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight" in state
    # Heads leave no trace in the tensors. Released: one as wide as the block with a context, 32 channels each without.
    unet = UNet.from_checkpoint(state, head_channels=None if conditional else 32)
    if conditional and "classes" not in parts:
        raise ValueError(f"{parts['unet'][0]}: its U-Net takes a class, but no file of {folder} embeds classes")
    classes = parts["classes"][1]["cond_stage_model.embedding.weight"] if conditional else None
    null = classes[-1:, None].float().to(device) if conditional else None  # 1 1 M
    first_stage = parts["autoencoder"][1]
    prefix = "first_stage_model." if "first_stage_model.encoder.conv_in.weight" in first_stage else ""
    autoencoder = Autoencoder.from_checkpoint(first_stage, prefix)
    clip = CLIP.from_checkpoint(parts["clip"][1])
    tokenizer = Tokenizer(parts["merges"][0])
    if tokenizer.vocab_size != clip.token_embedding.num_embeddings:
        raise ValueError(f"{parts['merges'][0]} makes {tokenizer.vocab_size} tokens, {parts['clip'][0].name} knows "
                         f"{clip.token_embedding.num_embeddings}: the merges are cut short, or another CLIP's")
    for model in (unet, autoencoder, clip):
        model.requires_grad_(False).eval().to(device)
    # Pictures of every released LDM that loads here have 256 pixels; a file that knows better says so.
    size = int(state.get("image_size", 256))
    name = "the embedded default emoji64" if weights is None else "; ".join(seen)
    return Base(unet, autoencoder, clip, tokenizer, null, size, device, name)


def fingerprint(model: nn.Module) -> str:
    """16 hex digits from the name, shape and up to 64 evenly spread values of every tensor, in float32."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        values = tensor.flatten()
        values = values[:: max(1, len(values) // 64)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {values.tolist()}".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(base: Base, paths: list[Path], batch: int = 16) -> tuple[Tensor, Tensor]:
    """Pictures, as they are and mirrored -> latents (N 2 C h w) and unit CLIP image embeddings (N 2 D), on the CPU."""
    latents, embeddings = [], []
    for i in tqdm(range(0, len(paths), batch), "encoding", leave=False, delay=2, unit_scale=batch, unit="img"):
        pictures = [open_rgb(path) for path in paths[i : i + batch]]
        x = torch.stack([to_square(picture, base.size) for picture in pictures]).to(base.device)  # B 3 S S
        views = torch.stack([base.clip.preprocess(picture) for picture in pictures]).to(base.device)  # B 3 R R
        latents.append(torch.stack([base.autoencoder.encode(x), base.autoencoder.encode(x.flip(-1))], dim=1).cpu())
        pair = torch.stack([base.clip.encode_image(views), base.clip.encode_image(views.flip(-1))], dim=1)
        embeddings.append(F.normalize(pair, dim=-1).cpu())
    return torch.cat(latents), torch.cat(embeddings)


@torch.no_grad()
def embed_texts(base: Base, texts: list[str]) -> Tensor:
    """Prompts -> unit CLIP text embeddings (N D), on the CPU. ValueError for one that is longer than CLIP's context."""
    tokens = base.tokenizer(texts, base.clip.context_length).to(base.device)
    return F.normalize(base.clip.encode_text(tokens), dim=-1).cpu()


@dataclass
class Run:
    """A base with trained ANLs, and the centre and spread of the embeddings they were trained on."""

    base: Base
    anls: ANLs
    mu: Tensor  # (D,) mean unit image embedding of the training pictures
    mu_text: Tensor  # (D,) mean unit text embedding of their captions: CLIP's two towers have different centres
    sigma: float
    config: dict

    def condition(self, embeddings: Tensor, text: bool = False) -> Tensor:
        """Unit CLIP embeddings (B D) -> condition (e - mu) / sigma (B D), where 0 means "as the average picture"."""
        return ((embeddings - (self.mu_text if text else self.mu)) / self.sigma).to(self.base.device)

    def bind(self, cond: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """cond (B D) -> model(z, t) -> eps in float32; what depends on cond alone is computed once. bf16 on CUDA."""
        device, null = self.base.device.type, self.base.null
        context = None if null is None else null.expand(len(cond), -1, -1)  # B 1 M
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            extra = self.anls.bind(cond)

        def model(z: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                return self.base.unet(z, t, context, extra).float()

        return model


def save(content: dict, path: Path) -> None:
    """torch.save that leaves either the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    torch.save(content, part)
    os.replace(part, path)


def load_run(run: str | Path, weights: str | Path | None = None, device: str | None = None) -> Run:
    """The trained model of a run folder, on its base (`weights`: where the base lies now, if it has moved).

    FileNotFoundError: no adapter.pt there. ValueError: the base or CLIP is not the one it was trained on."""
    path = Path(run) / "adapter.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --run takes a folder that `python -m tinyanl.train` wrote")
    adapter = torch.load(path, map_location="cpu", weights_only=True)
    config = adapter["config"]
    base = load_base(weights or config["weights"], device)
    for part, found in base.fingerprints().items():
        if found != (expected := adapter["fingerprints"][part]):
            raise ValueError(f"{path} was trained on another {part} ({expected}, here {found}): "
                             "give the folder with the right one as --weights")
    anls = ANLs(base.unet.sites, base.clip.dim, config["tokens"], config["ratio"])
    anls.load_state_dict(adapter["anls"])
    anls.requires_grad_(False).to(base.device)
    return Run(base, anls, adapter["mu"], adapter["mu_text"], adapter["sigma"], config)
