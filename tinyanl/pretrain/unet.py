"""Pretraining the U-Net: a denoiser of the first stage's latents, conditioned on a class.

An eighth of the labels says "no class", which is the last row of the table of classes: such a model
can be guided (Ho & Salimans 2022). B batch, N pictures, C h w latent, S picture side.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..autoencoder import Autoencoder
from ..clip import CLIP
from ..metrics import frechet_distance
from ..models import fingerprint, generator, pick_device
from ..sample import denoise
from ..schedule import Denoiser, add_noise, ldm_alpha_bar, min_snr_weights
from ..unet import UNet
from ..weights import load_checkpoint
from .art import Art, composite, read_art
from .families import FAMILIES
from .linear import fit_convolution, keep_inputs
from .training import SIZE, fit, load_frozen, save_grid, save_ldm

ALPHA_BAR = ldm_alpha_bar()
CHANNELS = 64  # at the resolution of the latents
CLASS_WIDTH = 128  # of a class's embedding, and so of the U-Net's context
NO_CLASS_RATE = 1 / 8
CLASSES = "cond_stage_model.embedding.weight"


class ClassConditionalUNet(nn.Module):
    """A U-Net that takes classes (B,) int64 in place of a context."""

    def __init__(self, classes: nn.Embedding, unet: UNet):
        super().__init__()
        self.classes = classes
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Noisy latents z (B C h w) at times t (B,) -> the noise in them (B C h w), float32."""
        return self.unet(z, t, self.classes(label)[:, None]).float()


def without_families(art: Art) -> Art:
    """The pictures of no family: those are what the U-Net shall be transferred to."""
    families = tuple(FAMILIES.values())
    rest = [i for i, row in enumerate(art.rows) if not row["subgroup"].startswith(families)]
    return art.select(rest)


def classes_of(art: Art) -> tuple[list[str], Tensor]:
    """All labels in sorted order, which are the classes, and the class of each picture (N,)."""
    names = sorted({row["label"] for row in art.rows})
    return names, torch.tensor([names.index(row["label"]) for row in art.rows])


@torch.no_grad()
def encode_art(
    art: Art, first_stage: Autoencoder, n: int, seed: int, fast: bool
) -> tuple[Tensor, Tensor]:
    """n pictures drawn at random -> their latents (n C h w), on the CPU, and indices into art (n,).

    n is rounded up to a multiple of 64. fast: in bf16."""
    device = pick_device()
    latents = []
    indices = []
    for i in tqdm(range(0, n, 64), "encoding", unit_scale=64, unit="img"):
        x, index, _ = composite(art, 64, SIZE, generator(seed, -1 - i))
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            z = first_stage.encode(x.to(device))
        latents.append(z.float().cpu())
        indices.append(index)
    return torch.cat(latents), torch.cat(indices)


def fresh_model(channels: int, classes: int) -> ClassConditionalUNet:
    """The model before training, for latents of so many channels."""
    unet = UNet(
        in_channels=channels,
        out_channels=channels,
        channels=CHANNELS,
        mult=(1, 2, 3),
        blocks=1,
        attention=(False, True, True),
        context_dim=CLASS_WIDTH,
    )
    return ClassConditionalUNet(nn.Embedding(classes + 1, CLASS_WIDTH), unet)


def start_from(init: Path, classes: int, z0: Tensor) -> ClassConditionalUNet:
    """The U-Net of the folder `init`, with its table of classes if that has as many rows.

    z0 (N C h w): latents to denoise, which may have channels that are new to it."""
    state = load_checkpoint(init / "ldm.ckpt")
    embedding = nn.Embedding(classes + 1, CLASS_WIDTH)
    earlier = state.get(CLASSES)
    if earlier is not None and earlier.shape == embedding.weight.shape:
        embedding.weight.data.copy_(earlier)
    model = ClassConditionalUNet(embedding, UNet.from_checkpoint(state))
    if model.unet.in_channels != z0.shape[1]:
        add_channels(model, z0)
    return model


@torch.no_grad()
def add_channels(model: ClassConditionalUNet, z0: Tensor) -> None:
    """Let the U-Net, whose latents are the first channels of z0 (N C h w), denoise all of them.

    What it says about those that it knows stays nearly the same, and the noise in the others is
    fitted. ValueError: it knows more channels than z0 has."""
    unet = model.unet
    known = unet.in_channels
    channels = z0.shape[1]
    if channels < known:
        raise ValueError(f"the U-Net of --init denoises {known} channels, the first stage has only "
                         f"{channels}")
    old = unet.input_blocks[0][0]
    first = nn.Conv2d(channels, old.out_channels, 3, padding=1)
    keep_inputs(first, old)
    unet.input_blocks[0][0] = first
    unet.in_channels = channels

    old = unet.out[-1]
    unet.out[-1] = nn.Identity()  # so that the U-Net gives what its last convolution takes
    t = torch.randint(len(ALPHA_BAR), (len(z0),))
    eps = torch.randn_like(z0)
    no_class = torch.full_like(t, model.classes.num_embeddings - 1)
    hidden = model(add_noise(z0, t, eps, ALPHA_BAR), t, no_class)
    last = nn.Conv2d(old.in_channels, channels, 3, padding=1)
    fit_convolution(last, hidden, eps)
    last.weight[:known] = old.weight
    last.bias[:known] = old.bias
    unet.out[-1] = last


def denoising_loss(
    model: ClassConditionalUNet, z_t: Tensor, t: Tensor, label: Tensor, eps: Tensor, weight: Tensor
) -> Tensor:
    """Weighted mean over the batch of |eps_hat - eps|^2; z_t, eps (B C h w), the rest (B,)."""
    error = (model(z_t, t, label) - eps).square().mean((1, 2, 3))  # B
    return (error * weight).mean()


@dataclass
class Painter:
    """A trained model with its first stage. fast: in bf16."""

    model: ClassConditionalUNet
    first_stage: Autoencoder
    fast: bool

    def bind(self, label: Tensor) -> Denoiser:
        def denoiser(z: Tensor, t: Tensor) -> Tensor:
            with torch.autocast(z.device.type, torch.bfloat16, enabled=self.fast):
                return self.model(z, t, label)

        return denoiser

    def paint(self, labels: Tensor, guidance: float, steps: int, g: torch.Generator) -> Tensor:
        """Labels (N,) -> pictures (N 3 S S) in [-1, 1], on the CPU, by DDIM with guidance."""
        device = pick_device()
        side = SIZE // self.first_stage.factor
        channels = self.model.unet.in_channels
        noise = torch.randn(len(labels), channels, side, side, generator=g)  # N C h w
        no_class = torch.tensor([self.model.classes.num_embeddings - 1], device=device)
        batches = denoise(
            self.bind,
            self.first_stage.decode,
            noise.to(device),
            cond=labels.to(device),
            null=no_class,
            guidance=guidance,
            steps=steps,
            eta=0.0,
            generator=g,
            batch=64,
        )
        return torch.cat(list(batches))


@torch.no_grad()
def reconstruct(first_stage: Autoencoder, x: Tensor) -> Tensor:
    """Pictures (N 3 S S) through the first stage and back, on its device, clipped to [-1, 1]."""
    parts = [part.to(pick_device()) for part in x.split(64)]
    return torch.cat([first_stage.decode(first_stage.encode(part)) for part in parts]).clamp(-1, 1)


def frechet_distances(
    critic: CLIP, pictures: dict[str, Tensor], others: Tensor
) -> dict[str, float]:
    """How far sets of pictures are from as many other fresh ones, in the critic's space."""
    expected = critic.embed(others)
    figures = {}
    for name, x in pictures.items():
        measured = f"1000 x Frechet distance in CLIP space, {len(x)} {name} and fresh pictures"
        figures[measured] = 1000 * frechet_distance(critic.embed(x), expected)
    return figures


def show_and_measure(
    painter: Painter, critic: CLIP, art: Art, looks: int, path: Path, g: torch.Generator
) -> dict[str, float]:
    """Draw guided samples into `path`, and measure how far samples are from fresh pictures."""
    names, label_of = classes_of(art)
    fresh, index, _ = composite(art, min(5000, looks), SIZE, g)
    others, _, _ = composite(art, len(fresh), SIZE, g)
    shown = torch.randint(len(names), (min(96, looks),), generator=g)
    save_grid(painter.paint(shown, guidance=3.5, steps=50, g=g), path)
    print(f"{path.name}, row by row:", ", ".join(names[i] for i in shown))
    pictures = {
        "fresh": fresh,
        "reconstructed": reconstruct(painter.first_stage, fresh),
        "sampled": painter.paint(label_of[index], guidance=1.0, steps=25, g=g),
    }
    return frechet_distances(critic, pictures, others)


def train_unet(
    data: list[Path],
    out: Path,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    looks: int,
    init: Path | None,
    fast: bool,
) -> dict[str, float]:
    """Train on `looks` latents, encoded once by the first stage of the folder `out`.

    The CLIP of that folder measures the result."""
    art = without_families(read_art(data))
    first_stage = load_frozen(Autoencoder, out / "ldm.ckpt")
    critic = load_frozen(CLIP, out / "clip.pt")
    names, label_of = classes_of(art)
    latents, indices = encode_art(art, first_stage, looks, seed, fast)
    labels = label_of[indices]
    weights = min_snr_weights(ALPHA_BAR).float()

    def draw_batch(g: torch.Generator) -> tuple[Tensor, ...]:
        i = torch.randint(looks, (batch,), generator=g)
        t = torch.randint(len(ALPHA_BAR), (batch,), generator=g)
        has_no_class = torch.rand(batch, generator=g) < NO_CLASS_RATE
        label = torch.where(has_no_class, len(names), labels[i])
        z0 = latents[i]  # B C h w
        eps = torch.randn(z0.shape, generator=g)
        return add_noise(z0, t, eps, ALPHA_BAR), t, label, eps, weights[t]

    torch.manual_seed(seed)
    if init:
        model = start_from(init, len(names), latents[:256])
    else:
        model = fresh_model(latents.shape[1], len(names))
    config = {
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "lr": lr,
        "looks": looks,
        "first_stage": fingerprint(first_stage),
        "init": str(init),
        "classes": ";".join(names),
    }
    model = fit(model, draw_batch, denoising_loss, out / "training/unet.pt", config, fast)
    save_ldm(
        out / "ldm.ckpt",
        {
            "first_stage_model": first_stage,
            "model.diffusion_model": model.unet,
            "cond_stage_model.embedding": model.classes,
        },
    )

    painter = Painter(model, first_stage, fast)
    path = out / "training/unet.png"
    return show_and_measure(painter, critic, art, looks, path, generator(seed, steps))
