"""Pretraining the first stage: VQ-f4 (Esser et al. 2021) without a discriminator.

The codes are learned last, by k-means over the latents of the trained encoder; until then the
decoder sees noise as large as the distance between codes. B batch, C h w latent, S picture side.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoder import Autoencoder, Quantizer
from ..clip import CLIP
from ..metrics import psnr
from ..models import fingerprint, generator
from ..weights import load_checkpoint
from .art import Art, composite, read_art
from .codes import k_means
from .training import SIZE, fit, load_frozen, save_grid, save_ldm

CHANNELS = 32  # of the encoder and decoder at full resolution
LATENT_CHANNELS = 3
CODES = 16384
CODE_DISTANCE = 0.06  # of latents with a variance of 1
CRITIC_LAYERS = 3  # of CLIP's vision tower, whose patch tokens are compared


class PatchFeatures(nn.Module):
    """The first layers of CLIP's vision tower: (B 3 S S) in [-1, 1] -> unit tokens (B N W).

    The CLIP that is given loses the layers behind them."""

    def __init__(self, clip: CLIP, layers: int):
        super().__init__()
        self.clip = clip
        blocks = clip.visual.transformer.resblocks
        clip.visual.transformer.resblocks = blocks[:layers]

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.clip.visual.tokens(self.clip.normalize(x))
        return F.normalize(tokens[:, 1:].float(), dim=-1)  # without the class token


def reconstruction_loss(x: Tensor, y: Tensor, features: PatchFeatures) -> Tensor:
    """|y - x| + 4 |y - x|^2 + a tenth of the squared distance of their patch features."""
    perceptual = (features(y) - features(x)).square().sum(-1).mean()
    return F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 0.1 * perceptual


def whiteness_penalty(z: Tensor) -> Tensor:
    """How far latents (B C h w) are from a mean of 0 and a covariance that is the identity."""
    points = z.float().movedim(1, -1).flatten(0, 2)  # B*h*w C
    identity = torch.eye(z.shape[1], device=z.device)
    return (torch.cov(points.T) - identity).square().sum() + points.mean(0).square().sum()


def first_stage(init: Path | None) -> Autoencoder:
    """The autoencoder to train, fresh or that of the folder `init`, its codes not learned yet."""
    if init:
        model = Autoencoder.from_checkpoint(load_checkpoint(init / "ldm.ckpt"))
    else:
        model = Autoencoder(CHANNELS, z_channels=LATENT_CHANNELS, embed_dim=LATENT_CHANNELS)
    model.quantize = Quantizer(CODES, model.post_quant_conv.in_channels).requires_grad_(False)
    return model


def pictures_for_codes(art: Art, seen: int, g: torch.Generator) -> Tensor:
    """Pictures (N 3 S S) with more latent vectors than there are codes, N at most 1,024 and `seen`
    where that suffices."""
    fewest = CODES // 256  # a picture has 16 x 16 latent vectors
    x, _, _ = composite(art, max(fewest, min(1024, seen)), SIZE, g)
    return x


def learn_codes(model: Autoencoder, x: Tensor) -> None:
    """Spread the model's codes over its latents of pictures x (N 3 S S)."""
    z = torch.cat([model.encode(part) for part in x.split(64)])  # N C h w
    points = z.movedim(1, -1).flatten(0, 2)  # N*h*w C
    codes = model.quantize.embedding.weight
    codes.copy_(k_means(points, len(codes)))


def show_reconstructions(model: Autoencoder, x: Tensor, path: Path) -> float:
    """PSNR in dB of the reconstructions of x (N 3 S S); the first twelve are drawn into `path`."""
    y = torch.cat([model.decode(model.encode(part)) for part in x.split(64)])
    save_grid(torch.cat([x[:12], y[:12]]), path, columns=min(12, len(x)))
    return psnr(x, y)


def train_autoencoder(
    data: list[Path], out: Path, steps: int, batch: int, seed: int, init: Path | None, fast: bool
) -> dict[str, float]:
    """Train the first stage, with the CLIP of the folder `out` as its critic."""
    art, held_out = read_art(data).split()
    clip = load_frozen(CLIP, out / "clip.pt")
    critic = fingerprint(clip)  # of all of it, before it is cut
    features = PatchFeatures(clip, CRITIC_LAYERS)
    torch.manual_seed(seed)
    model = first_stage(init)
    side = SIZE // model.factor
    latent_shape = (batch, model.post_quant_conv.in_channels, side, side)

    def draw_batch(g: torch.Generator) -> tuple[Tensor, ...]:
        x, _, _ = composite(art, batch, SIZE, g)
        return x, CODE_DISTANCE * torch.randn(latent_shape, generator=g)

    def loss_of(model: Autoencoder, x: Tensor, noise: Tensor) -> Tensor:
        z = model.encode(x)
        y = model.decoder(model.post_quant_conv(z + noise)).float()
        return reconstruction_loss(x, y, features) + whiteness_penalty(z)

    config = {
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "critic": critic,
        "init": str(init),
        "data": str(data),
    }
    model = fit(model, draw_batch, loss_of, out / "training/autoencoder.pt", config, fast).cpu()
    learn_codes(model, pictures_for_codes(art, steps * batch, generator(seed, steps)))
    # alone in its file: a U-Net that was there knew other latents
    save_ldm(out / "ldm.ckpt", {"first_stage_model": model})

    figures = {}
    for name, part in held_out.items():
        x, _, _ = composite(part, torch.arange(len(part.rows)), SIZE, generator(seed, steps))
        path = out / f"training/autoencoder {name}.png"
        figures[f"PSNR in dB, {len(x)} {name}"] = show_reconstructions(model, x, path)
    return figures
