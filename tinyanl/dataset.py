"""A folder of pictures becomes what training draws from: latents, conditions, and batches of them.

Everything frozen that depends on a picture alone is computed here, once. A batch is then drawn on
the CPU from (seed, step) alone, so that a resumed run needs no saved random states, and every
process of torchrun draws the same one and takes its part. N pictures, B batch, C h w latent, D CLIP
embedding width, S picture side.
"""
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .data import Folder, file_identity
from .encode import NEUTRAL, embed_texts, encode
from .masking import mask_condition
from .models import Base, generator, split, to_condition

COND_DROP = 0.1  # share of the samples trained without condition, for rate 1 and for guidance
T = 1000  # timesteps
CURVE_SIZE = 64  # samples behind each point of the loss curves


class Batch(NamedTuple):
    """What the loss of one step takes, and the pictures it was drawn from, for messages."""

    z0: Tensor  # B C h w
    cond: Tensor  # B D
    t: Tensor  # B
    eps: Tensor  # B C h w
    pictures: Tensor  # B, indices

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device. A GPU copies from pinned memory while it computes something
        else."""
        if device.type == "cpu":
            return self
        if device.type == "cuda":
            sent = [x.pin_memory().to(device, non_blocking=True) for x in self[:4]]
        else:
            sent = [x.to(device) for x in self[:4]]
        return Batch(*sent, self.pictures)


@dataclass
class TrainingData:
    """An encoded folder, on the CPU: a step needs little of it, which is sent to the device."""

    names: list[str]  # of the pictures, relative to their folder
    files: list[str]  # identities of their contents
    latents: Tensor  # N 2 C h w: of each picture and its mirror image
    cond: Tensor  # N 2 D: (e - mu) / sigma, where 0 means "as the average picture"
    train_ids: Tensor
    held_ids: Tensor
    mu: Tensor  # D, mean unit embedding of the training pictures
    mu_text: Tensor  # D, of their captions: CLIP's two towers have different centres
    sigma: float
    seed: int

    def batch(self, step: int, size: int, train_mask: float) -> Batch:
        """The training batch of a step."""
        return training_batch(self.latents, self.cond, self.train_ids, size, train_mask, self.seed,
                              step)

    def curves(self) -> dict[str, Batch]:
        """The fixed batches whose losses make the curves of training and held-out pictures."""
        return {"training": curve_batch(self.latents, self.cond, self.train_ids),
                "held_out": curve_batch(self.latents, self.cond, self.held_ids)}


def encode_folder(base: Base, folder: Folder, root: Path, seed: int, centred: bool = True,
                  cache: Path | None = None) -> TrainingData:
    """The pictures that `scan` found in `root`, encoded, split by `seed`, with their centre and
    spread.

    cache: where latents and embeddings lie that memory cannot hold. ValueError: a picture cannot be
    encoded, or CLIP sees no difference between the training pictures."""
    paths = [picture.path for picture in folder.pictures]
    latents, embeddings = encode(base, paths, cache=cache)  # N 2 C h w, N 2 D
    train_ids, held_ids = split(paths, seed)
    captions = [folder.pictures[i].text for i in train_ids.tolist() if folder.pictures[i].text]
    mu = embeddings[train_ids].mean((0, 1))
    mu_text = embed_texts(base, captions or list(NEUTRAL), cut=True).mean(0)
    if not centred:
        mu, mu_text = torch.zeros_like(mu), torch.zeros_like(mu_text)
    sigma = (embeddings[train_ids] - mu).square().mean().sqrt().item()
    if not sigma > 1e-6:
        raise ValueError(f"CLIP sees no difference between the pictures of {root} that are trained "
                         f"on ({len(train_ids)}; {len(held_ids)} held out): add different ones")
    names = [str(path.relative_to(root)) for path in paths]
    files = [file_identity(path) for path in paths]
    cond = to_condition(embeddings, mu, sigma)
    return TrainingData(names, files, latents, cond, train_ids, held_ids, mu, mu_text, sigma, seed)


def training_batch(latents: Tensor, cond: Tensor, ids: Tensor, batch: int, train_mask: float,
                   seed: int, step: int) -> Batch:
    """The batch of one step, drawn on the CPU from (seed, step) alone.

    latents (N 2 C h w) and cond (N 2 D) of pictures and their mirror images, ids of the pictures to
    use. A share of the conditions is dropped (COND_DROP), another (train_mask) is masked at a rate
    drawn between 0 and 1."""
    g = generator(seed, step)
    i = torch.randint(2 * len(ids), (batch,), generator=g)
    picture = ids[i // 2]
    mirrored = i % 2
    t = torch.randint(T, (batch,), generator=g)
    eps = torch.randn(batch, *latents.shape[2:], generator=g)
    choice, partial_rate = torch.rand(2, batch, 1, generator=g)                    # each B 1
    rate = torch.zeros(batch, 1)
    rate = torch.where(choice < COND_DROP + train_mask, partial_rate, rate)
    rate = torch.where(choice < COND_DROP, 1.0, rate)
    masked = mask_condition(cond[picture, mirrored], rate, g)
    return Batch(latents[picture, mirrored], masked, t, eps, picture)


def curve_batch(latents: Tensor, cond: Tensor, ids: Tensor, size: int = CURVE_SIZE) -> Batch:
    """The same pictures, evenly spread timesteps and noise every time: a curve of such losses shows
    the model, not the draw. latents (N 2 C h w), cond (N 2 D), ids of the pictures to use."""
    i = torch.arange(size)
    picture = ids[i % len(ids)]
    eps = torch.randn(size, *latents.shape[2:], generator=torch.Generator().manual_seed(0))
    order = i * 29 % size  # a permutation that all published curves used: pictures and times mix
    t = (order * T + T // 2) // size  # the middles of `size` equal parts of all times
    return Batch(latents[picture, 0], cond[picture, 0], t, eps, picture)
