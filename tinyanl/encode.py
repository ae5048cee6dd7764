"""Pictures and prompts become what the models work on: latents of the first stage, and unit
embeddings of CLIP.

Both depend on a picture alone, so they are computed once, with its mirror image, and kept: in
memory, or, past 4 GiB (CelebA's 200,000 pictures at 256 pixels take 19), in mapped files. N
pictures or texts, B batch, C h w latent, D CLIP embedding width, S picture side, R CLIP's picture
side.
"""
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from .data import open_rgb, to_square
from .models import Base
from .runs import save

IN_MEMORY = 2**32  # bytes of latents and embeddings; more are kept in mapped files
SAVE_EVERY = 100  # batches of pictures that are encoded into such files
MANY = 512  # pictures; for fewer, starting processes that decode them takes longer than it saves
NEUTRAL = ("", "a picture", "a photo", "a drawing")  # the average caption where a set has none


def processes() -> tuple[int, int]:
    """This process's rank and the number of torchrun's processes; 0 and 1 without it."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def wait_for_all(error: ValueError | None = None) -> None:
    """Wait until all processes are here. ValueError in each of them: one of them came with it."""
    errors = [error]
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
    for met in errors:
        if met is not None:
            raise met


class Batches(Dataset):
    """Item k: the k-th of some lists of files, decoded and resized for the first stage (B 3 S S)
    and for CLIP (B 3 R R); or the ValueError that names a file which cannot be read.

    Arrays, as a DataLoader would send tensors through shared memory, of which containers have
    little; and an error that is returned keeps its one line, where a raised one gets a traceback.
    """

    def __init__(self, base: Base, lists: list[list[Path]], latents: bool):
        self.lists = lists
        self.resized_for = {"embeddings": base.clip.preprocess}
        if latents:
            self.resized_for["latents"] = lambda picture: to_square(picture, base.size)

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, k: int) -> dict | ValueError:
        try:
            pictures = [open_rgb(path) for path in self.lists[k]]
        except ValueError as error:
            return error
        return {name: torch.stack([resized(picture) for picture in pictures]).numpy()
                for name, resized in self.resized_for.items()}


def unchanged(item: dict | ValueError) -> dict | ValueError:
    """In place of a DataLoader's conversion of arrays to tensors."""
    return item


def decoded(batches: Batches, pictures: int) -> DataLoader:
    """The items of `batches` in their order, from processes of their own where there are many
    pictures."""
    workers = 0
    if pictures >= MANY and sys.platform == "linux":  # elsewhere each would load the models again
        _, world = processes()
        workers = max(1, min(4, len(os.sched_getaffinity(0)) // world))
    return DataLoader(batches, batch_size=None, collate_fn=unchanged, num_workers=workers,
                      multiprocessing_context="fork" if workers else None,
                      generator=torch.Generator())  # of its own: it draws a number


def mapped(path: Path, n: int) -> Tensor:
    """n float32 numbers that lie in a file. OSError: the disk has no room for them; without asking
    for it first, the system would kill the process at the first number that does not fit."""
    if hasattr(os, "posix_fallocate"):  # macOS and Windows have none
        try:
            with open(path, "ab") as file:
                os.posix_fallocate(file.fileno(), 0, 4 * n)
        except OSError as error:
            raise OSError(f"{path} needs {4 * n:,} bytes ({error.strerror}): make room, or give an "
                          "--out where there is some") from error
    return torch.from_file(str(path), True, n)


class Progress:
    """How many pictures, counted from the first, have their numbers in a folder of mapped files.

    progress.json names the pictures and weights that they belong to. It is written before the first
    byte of another set's numbers is, so that nobody takes these for what was there before.
    """

    def __init__(self, cache: Path, base: Base, paths: list[Path]):
        cache.mkdir(parents=True, exist_ok=True)
        self.path = cache / "progress.json"
        facts = [*base.fingerprints().values()]
        for path in paths:
            stat = path.stat()
            facts.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
        self.of = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        kept = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.done = kept["done"] if kept.get("of") == self.of else 0
        if self.done == 0:
            self.save(0)

    def save(self, done: int) -> None:
        """Note that the numbers of the first `done` pictures are on the disk, by all processes."""
        for file in self.path.parent.iterdir():  # should the power fail, they must be there
            if file != self.path:
                with open(file, "r+b") as mapped:
                    os.fsync(mapped.fileno())
        wait_for_all()
        save(json.dumps({"of": self.of, "done": done}), self.path)
        wait_for_all()


def encode_batch(base: Base, views: dict, paths: list[Path]) -> dict[str, Tensor]:
    """Decoded pictures of `Batches` -> "embeddings" (B 2 D) and "latents" (B 2 C h w), of each
    picture and its mirror image. ValueError names a picture whose numbers are not finite."""
    models = {"latents": base.autoencoder.encode,
              "embeddings": lambda x: F.normalize(base.clip.encode_image(x), dim=-1)}
    encoded = {}
    for name, array in views.items():
        x = torch.from_numpy(array).to(base.device)  # B 3 S S or B 3 R R
        both = [models[name](view).cpu() for view in (x, x.flip(-1))]
        encoded[name] = torch.stack(both, dim=1)
    for i, path in enumerate(paths):
        if not all(numbers[i].isfinite().all() for numbers in encoded.values()):
            raise ValueError(f"{path} becomes numbers that are not finite: are the weights "
                             f"damaged? ({base.name})")
    return encoded


def encode_share(base: Base, paths: list[Path], numbers: dict[str, Tensor], starts: range,
                 progress: Progress | None) -> None:
    """Write this process's rows of `numbers`: of the batches, which begin at `starts`, it takes
    every world-th."""
    rank, world = processes()
    batch = starts.step
    mine = starts[rank::world]
    lists = [paths[i : i + batch] for i in mine]
    loader = decoded(Batches(base, lists, latents="latents" in numbers), pictures=len(paths))
    bar = tqdm(loader, "encoding", leave=False, delay=2, unit_scale=batch * world, unit="img",
               disable=rank > 0)
    for k, views in enumerate(bar):
        if isinstance(views, ValueError):
            raise views
        for name, encoded in encode_batch(base, views, lists[k]).items():
            numbers[name][mine[k] : mine[k] + batch] = encoded
        done = (k + 1) * world  # batches, by all processes, except in a last round of fewer
        if progress and (k + 1) % SAVE_EVERY == 0 and done <= len(starts):
            progress.save(starts.start + done * batch)


def send_rows(numbers: dict[str, Tensor], starts: range) -> None:
    """Send the rows of each batch from the process that encoded it to the others."""
    _, world = processes()
    if world == 1:
        return
    for k, i in enumerate(starts):
        for x in numbers.values():
            dist.broadcast(x[i : i + starts.step], src=k % world)


@torch.no_grad()
def encode(base: Base, paths: list[Path], batch: int = 16, cache: Path | None = None,
           latents: bool = True) -> tuple[Tensor | None, Tensor]:
    """Pictures, as they are and mirrored -> latents (N 2 C h w), if wanted, and unit CLIP image
    embeddings (N 2 D), on the CPU.

    Those of more than IN_MEMORY bytes become files in the folder `cache`, mapped into memory; when
    a call was stopped, the next one for the same pictures and weights goes on. Of torchrun's
    processes each encodes a part of the batches, and all of them get all numbers: these are the
    same however many there are. ValueError names the picture that cannot be read or encoded.
    """
    shapes = {"embeddings": (len(paths), 2, base.clip.dim)}
    if latents:
        shapes["latents"] = (len(paths), 2, *base.latent_shape)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if cache and 4 * sum(sizes.values()) > IN_MEMORY:
        progress = Progress(cache, base, paths)
        numbers = {name: mapped(cache / name, n) for name, n in sizes.items()}
    else:
        progress = None
        numbers = {name: torch.empty(n) for name, n in sizes.items()}
    numbers = {name: x.view(shapes[name]) for name, x in numbers.items()}

    first = progress.done if progress else 0
    starts = range(first, len(paths), batch)
    try:
        encode_share(base, paths, numbers, starts, progress)
    except ValueError as error:
        wait_for_all(error)
    wait_for_all()
    if progress is None:
        send_rows(numbers, starts)
    elif starts:
        progress.save(len(paths))
    return numbers.get("latents"), numbers["embeddings"]


@torch.no_grad()
def embed_pictures(base: Base, x: Tensor, batch: int = 64) -> Tensor:
    """Pictures (N 3 S S) uint8 -> unit CLIP embeddings (N D) on the CPU, through CLIP's own
    preprocessing."""
    parts = []
    for part in x.split(batch):
        views = [base.clip.preprocess(to_pil_image(picture)) for picture in part]
        parts.append(base.clip.encode_image(torch.stack(views).to(base.device)).cpu())
    return F.normalize(torch.cat(parts), dim=-1)


@torch.no_grad()
def embed_texts(base: Base, texts: list[str], cut: bool = False, batch: int = 256) -> Tensor:
    """Prompts -> unit CLIP text embeddings (N D), on the CPU.

    What exceeds CLIP's context is cut, or a ValueError."""
    tokens = base.tokenizer(texts, base.clip.context_length, cut).to(base.device)  # N T
    parts = [base.clip.encode_text(part) for part in tokens.split(batch)]
    return F.normalize(torch.cat(parts), dim=-1).cpu()
