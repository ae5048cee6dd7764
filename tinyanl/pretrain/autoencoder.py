"""Pretraining the first stage: KL-f4 (Rombach et al. 2022) without a discriminator.

A 4x4 patch has 48 numbers, and the latent keeps 16 of them. It starts as, and is held near, the
best linear code of patches (PatchCode): what a network alone finds in the time that a CPU has keeps
less of the texture that tells one kind of flower from another. The decoder can be trained further
alone: a U-Net of these latents goes on fitting them.
B batch, C h w latent, S picture side.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autoencoder import Autoencoder
from ..clip import CLIP
from ..metrics import psnr
from ..models import fingerprint, generator, pick_device
from ..runs import save
from ..weights import load_checkpoint
from .art import Art, composite, read_art
from .linear import PatchCode, fit_convolution
from .training import SIZE, fit, fp16_state, load_frozen, save_grid, save_ldm

CHANNELS = 32  # of the encoder and decoder at full resolution
LATENT_CHANNELS = 16
LOG_VARIANCE = -6.0  # of the posterior at the start
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


def reconstruction_loss(x: Tensor, y: Tensor, features: PatchFeatures, code: PatchCode) -> Tensor:
    """How far y is from x: |y - x| + 4 |y - x|^2, a tenth of the squared distance of their patch
    features, and 0.3 of the distance of their linear codes."""
    perceptual = (features(y) - features(x)).square().sum(-1).mean()
    texture = code.distance(code(y), code(x))
    return F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 0.1 * perceptual + 0.3 * texture


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Of N(mean, exp(log_variance)) from N(0, 1), the mean over all numbers. VAE, Kingma & Welling
    2014, appendix B."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def first_stage(init: Path | None, code: PatchCode, x: Tensor) -> Autoencoder:
    """The autoencoder to train; its latents are about the linear code of pictures x (N 3 S S).

    init: the folder of a first stage, of any latents, whose layers are taken over where they fit.
    Its decoder goes on with what it is used to."""
    model = Autoencoder(
        CHANNELS, z_channels=LATENT_CHANNELS, embed_dim=LATENT_CHANNELS, codes=None
    )
    earlier = None
    if init:
        earlier = Autoencoder.from_checkpoint(load_checkpoint(init / "ldm.ckpt"))
        take_over(model, earlier)
    start_linear(model, code, x)
    if earlier:
        keep_decoding(model, earlier, x)
    return model


@torch.no_grad()
def take_over(model: Autoencoder, earlier: Autoencoder) -> None:
    """Copy every tensor of the same name and shape."""
    state = earlier.state_dict()
    for name, value in model.state_dict().items():
        if name in state and state[name].shape == value.shape:
            value.copy_(state[name])


@torch.no_grad()
def start_linear(model: Autoencoder, code: PatchCode, x: Tensor) -> None:
    """Fit the encoder's last convolution so that the mean is the code of x (N 3 S S), and make the
    convolutions around the latent the identity."""
    encoder = model.encoder
    channels = LATENT_CHANNELS
    h = encoder.mid(encoder.down(encoder.conv_in(x)))
    h = F.silu(encoder.norm_out(h))
    mean = nn.Conv2d(h.shape[1], channels, 3, padding=1)
    fit_convolution(mean, h, code(x))
    encoder.conv_out.weight[:channels] = mean.weight
    encoder.conv_out.bias[:channels] = mean.bias
    encoder.conv_out.weight[channels:] = 0
    encoder.conv_out.bias[channels:] = LOG_VARIANCE
    for conv in (model.quant_conv, model.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def keep_decoding(model: Autoencoder, earlier: Autoencoder, x: Tensor) -> None:
    """Fit the decoder's first convolution so that it gives what the earlier one gave.

    Its fresh weights stay below the fitted ones: channels that start at zero would be learned late.
    """
    conv = model.decoder.conv_in
    fresh = conv.weight.clone()
    expected = earlier.decoder.conv_in(earlier.post_quant_conv(earlier.encode(x)))
    fit_convolution(conv, model.encode(x), expected)
    conv.weight.add_(0.3 * fresh)


def frozen_encoder(init: Path) -> Autoencoder:
    """The first stage of the folder `init`, only the decoder of which trains. ValueError: it is of
    another kind than those that are trained here."""
    path = init / "ldm.ckpt"
    model = Autoencoder.from_checkpoint(load_checkpoint(path))
    remedy = "without --decoder-only, a whole first stage is trained from it"
    if model.quantize is not None:
        codes = model.quantize.embedding.num_embeddings
        raise ValueError(f"{path} is a VQ of {codes} codes, --decoder-only takes a KL: {remedy}")
    channels = model.post_quant_conv.in_channels
    if channels != LATENT_CHANNELS:
        raise ValueError(
            f"{path} has latents of {channels} channels, --decoder-only takes {LATENT_CHANNELS}: "
            f"{remedy}"
        )
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    return model


def unit_scale(model: Autoencoder, x: Tensor) -> float:
    """What the latents of x (N 3 S S) must be multiplied by to have a deviation of 1 over all
    channels: the scale_factor of released KL models. A number that fp16 holds."""
    z = torch.cat([model.encode(part) for part in x.split(64)])
    return (1 / z.std()).half().item()


def show_reconstructions(model: Autoencoder, x: Tensor, path: Path) -> float:
    """PSNR in dB of the reconstructions of x (N 3 S S); the first twelve are drawn into `path`."""
    y = torch.cat([model.decode(model.encode(part)) for part in x.split(64)])
    save_grid(torch.cat([x[:12], y[:12]]), path, columns=min(12, len(x)))
    return psnr(x, y)


def train_autoencoder(
    data: list[Path],
    out: Path,
    steps: int,
    batch: int,
    seed: int,
    init: Path | None,
    decoder_only: bool,
    fast: bool,
) -> dict[str, float]:
    """Train the first stage, with the CLIP of the folder `out` as its critic.

    decoder_only: train the decoder of `init` further; all else in its file is kept. ValueError: no
    `init`, or a first stage of another kind in it."""
    if decoder_only and init is None:
        raise ValueError("--decoder-only goes on with a decoder: name its folder as --init")
    art, held_out = read_art(data).split()
    clip = load_frozen(CLIP, out / "clip.pt")
    critic = fingerprint(clip)  # of all of it, before it is cut
    features = PatchFeatures(clip, CRITIC_LAYERS)
    torch.manual_seed(seed)
    pictures, _, _ = composite(art, 256, SIZE, generator(seed, steps + 1))
    code = PatchCode(pictures, LATENT_CHANNELS)
    model = frozen_encoder(init) if decoder_only else first_stage(init, code, pictures)
    code.to(pick_device())
    side = SIZE // model.factor

    def draw_batch(g: torch.Generator) -> tuple[Tensor, ...]:
        x, _, _ = composite(art, batch, SIZE, g)
        return x, torch.randn(batch, LATENT_CHANNELS, side, side, generator=g)

    def loss_of(model: Autoencoder, x: Tensor, noise: Tensor) -> Tensor:
        moments = model.quant_conv(model.encoder(x)).float()
        mean, log_variance = moments.chunk(2, dim=1)  # each B C h w
        log_variance = log_variance.clamp(-20, 4)
        z = mean + (log_variance / 2).exp() * noise
        y = model.decoder(model.post_quant_conv(z)).float()
        nearness = code.distance(mean, code(x))
        kl = kl_divergence(mean, log_variance)
        return reconstruction_loss(x, y, features, code) + 0.3 * nearness + 1e-4 * kl

    config = {
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "critic": critic,
        "init": str(init),
        "decoder_only": decoder_only,
        "data": str(data),
    }
    model = fit(model, draw_batch, loss_of, out / "training/autoencoder.pt", config, fast).cpu()
    if decoder_only:
        state = load_checkpoint(init / "ldm.ckpt") | fp16_state(model, "first_stage_model.")
        save({"state_dict": state}, out / "ldm.ckpt")
    else:  # alone in its file: a U-Net that was there knew other latents
        model.scale_factor = unit_scale(model, pictures)
        save_ldm(out / "ldm.ckpt", {"first_stage_model": model})
    return measure(model, held_out, out / "training", generator(seed, steps))


def measure(
    model: Autoencoder, held_out: dict[str, Art], folder: Path, g: torch.Generator
) -> dict[str, float]:
    """The PSNR of each held-out part; some of its reconstructions are drawn into the folder."""
    figures = {}
    for name, part in held_out.items():
        x, _, _ = composite(part, torch.arange(len(part.rows)), SIZE, g)
        path = folder / f"autoencoder {name}.png"
        figures[f"PSNR in dB, {len(x)} {name}"] = show_reconstructions(model, x, path)
    return figures
