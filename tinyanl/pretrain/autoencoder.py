"""Pretraining the first stage: KL-f4 (Rombach et al. 2022), its latents chosen beforehand.

What the latents are to be is fixed before the first step: those of an earlier first stage, which a
U-Net knows already, and beside them the linear components of 4x4 patches that it gets most wrong.
Or, without an earlier one, the best linear code of patches. What a network finds alone, in the time
that a CPU has, keeps less of the texture that tells one kind of flower from another. So the encoder
only learns to compute the chosen latents, and the decoder to draw from them.
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
from ..weights import load_checkpoint
from .art import Art, composite, read_art
from .linear import Details, PatchCode, fit_convolution, keep_inputs
from .training import SIZE, fit, load_frozen, save_grid, save_ldm

CHANNELS = 32  # of the encoder and decoder at full resolution
LATENT_CHANNELS = 11
DETAIL_DEVIATION = 0.6  # of each channel of details: an earlier latent's is about 1
LOG_VARIANCE = -6.0  # of the posterior, everywhere: a deviation of 0.05
TEXTURE_CHANNELS = 16  # of the linear code in which reconstructions are compared
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


class ExtendedLatents(Details):
    """The latents of an earlier first stage, and details beside them.

    Pictures x (N 3 S S) to learn the details from; channels: of all. ValueError: fewer than the
    earlier ones."""

    def __init__(self, earlier: Autoencoder, x: Tensor, channels: int):
        known = earlier.post_quant_conv.in_channels
        if channels < known:
            raise ValueError(f"{channels} channels of latents are fewer than the {known} of --init")
        z = torch.cat([earlier.encode(part) for part in x.split(64)])  # N C h w
        y = torch.cat([drawn(earlier, part) for part in z.split(64)])
        super().__init__(x, y, channels - known, DETAIL_DEVIATION)
        self.deviation = torch.cat([z.std((0, 2, 3))[:, None, None], self.deviation])
        self.earlier = earlier

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        super().to(device)
        self.earlier.to(device)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Pictures (N 3 S S) -> latents (N C h w)."""
        return torch.cat([self.earlier.encode(x).float(), super().__call__(x)], dim=1)


def drawn(model: Autoencoder, z: Tensor) -> Tensor:
    """What the decoder makes of latents z (N C h w) that are not quantised: (N 3 S S)."""
    return model.decoder(model.post_quant_conv(z / model.scale_factor))


def first_stage(init: Path | None, x: Tensor) -> tuple[Autoencoder, PatchCode]:
    """The autoencoder to train, and what its latents are to be.

    init: the folder of an earlier first stage, whose latents and layers are kept. x (N 3 S S):
    pictures to choose the other latents from. ValueError: that one is wider or narrower."""
    channels = LATENT_CHANNELS
    model = Autoencoder(CHANNELS, z_channels=channels, embed_dim=channels, codes=None)
    if init is None:
        goal = PatchCode(x, channels)
        start(model, goal(x), x)
        return model, goal
    earlier = Autoencoder.from_checkpoint(load_checkpoint(init / "ldm.ckpt"))
    width = earlier.encoder.conv_in.out_channels
    if width != CHANNELS:
        raise ValueError(f"{init / 'ldm.ckpt'} has a first stage of {width} channels, not the "
                         f"{CHANNELS} of the one to train: leave --init out")
    earlier.requires_grad_(False)
    goal = ExtendedLatents(earlier, x, channels)
    take_over(model, earlier)
    start(model, goal(x), x)
    keep(model, earlier)
    return model, goal


@torch.no_grad()
def take_over(model: Autoencoder, earlier: Autoencoder) -> None:
    """Copy every tensor of the same name and shape."""
    state = earlier.state_dict()
    for name, value in model.state_dict().items():
        if name in state and state[name].shape == value.shape:
            value.copy_(state[name])


@torch.no_grad()
def start(model: Autoencoder, z: Tensor, x: Tensor) -> None:
    """Fit the encoder's last convolution so that the mean of pictures x (N 3 S S) is near z
    (N C h w), set the variance, and make the convolutions around the latent the identity."""
    channels = z.shape[1]
    encoder = model.encoder
    h = torch.cat([encoder.mid(encoder.down(encoder.conv_in(part))) for part in x.split(64)])
    h = F.silu(encoder.norm_out(h))
    mean = nn.Conv2d(h.shape[1], channels, 3, padding=1)
    fit_convolution(mean, h, z)
    encoder.conv_out.weight[:channels] = mean.weight
    encoder.conv_out.bias[:channels] = mean.bias
    encoder.conv_out.weight[channels:] = 0
    encoder.conv_out.bias[channels:] = LOG_VARIANCE
    for conv in (model.quant_conv, model.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)


@torch.no_grad()
def keep(model: Autoencoder, earlier: Autoencoder) -> None:
    """Make the first channels those of the earlier first stage, and the decoder what it was where
    the details are 0."""
    known = earlier.post_quant_conv.in_channels
    old = earlier.encoder.conv_out
    mix = earlier.quant_conv.weight[:known, :, 0, 0] * earlier.scale_factor
    new = model.encoder.conv_out
    new.weight[:known] = torch.einsum("ab,bcij->acij", mix, old.weight)
    new.bias[:known] = mix @ old.bias + earlier.quant_conv.bias[:known] * earlier.scale_factor
    back = earlier.post_quant_conv
    model.post_quant_conv.weight[:known, :known] = back.weight / earlier.scale_factor
    model.post_quant_conv.bias[:known] = back.bias
    keep_inputs(model.decoder.conv_in, earlier.decoder.conv_in)


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
    lr: float,
    seed: int,
    init: Path | None,
    fast: bool,
) -> dict[str, float]:
    """Train the first stage, with the CLIP of the folder `out` as its critic.

    Encoder and decoder learn beside each other: no gradient goes from one to the other."""
    art, held_out = read_art(data).split()
    clip = load_frozen(CLIP, out / "clip.pt")
    critic = fingerprint(clip)  # of all of it, before it is cut
    features = PatchFeatures(clip, CRITIC_LAYERS)
    torch.manual_seed(seed)
    pictures, _, _ = composite(art, 256, SIZE, generator(seed, steps + 1))
    model, goal = first_stage(init, pictures)
    code = PatchCode(pictures, TEXTURE_CHANNELS)
    goal.to(pick_device())
    code.to(pick_device())
    side = SIZE // model.factor

    def draw_batch(g: torch.Generator) -> tuple[Tensor, ...]:
        x, _, _ = composite(art, batch, SIZE, g)
        noise = torch.randn(batch, LATENT_CHANNELS, side, side, generator=g)
        return x, goal(x.to(pick_device())), noise

    def loss_of(model: Autoencoder, x: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        moments = model.quant_conv(model.encoder(x)).float()
        mean, log_variance = moments.chunk(2, dim=1)  # each B C h w
        distance = goal.distance(mean, z)
        z = mean + (log_variance / 2).exp() * noise
        y = model.decoder(model.post_quant_conv(z.detach())).float()
        return distance + reconstruction_loss(x, y, features, code)

    config = {
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "lr": lr,
        "critic": critic,
        "init": str(init),
        "data": str(data),
    }
    model = fit(model, draw_batch, loss_of, out / "training/autoencoder.pt", config, fast).cpu()
    # alone in its file: a U-Net that was there knew other latents
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
