"""Variations of labelled pictures: masked samples like each of them, in its class folder.

    python -m tinyanl.augment --run runs/flowers --data ./labelled --per-image 8 --out ./more

A sample keeps its picture's class: ./more/daisy/00012_like_a_3.png. Hidden coordinates of the
condition (--mask-rate) make it vary. Whether it has strayed from its class, or copies a picture
that the run was trained on, is printed and kept in augment.json: the cosine of its CLIP embedding
with that of its own picture, of the nearest one of another class, and of the nearest training
picture. N pictures, V variations of each, S picture side, D CLIP embedding width.
"""
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from .data import Folder, describe, scan
from .encode import embed_pictures, encode
from .metrics import nearest_similarity
from .models import Run, RunPictures, load_run, training_set
from .options import add_options, option
from .runs import command, mistakes_in_one_line, noting_signals, save
from .sample import GUIDANCE, STEPS, SamplingOptions, refuse_taken, sample, to_uint8

PART = 32  # pictures whose variations are painted and saved together


def augment(run: Run, paths: list[Path], per_image: int = 8, mask_rate: float = 0.3,
            steps: int = STEPS, seed: int = 0,
            guidance: float = GUIDANCE) -> tuple[Tensor, Tensor]:
    """Pictures -> samples like each (N V 3 S S) uint8, and the pictures' unit CLIP embeddings
    (N D)."""
    _, embeddings = encode(run.base, paths, latents=False)  # N 2 D
    embeddings = embeddings[:, 0]
    painted = variations(run, embeddings, per_image, mask_rate, steps, seed, guidance)
    return painted, embeddings


def variations(run: Run, embeddings: Tensor, per_image: int, mask_rate: float, steps: int,
               seed: int, guidance: float) -> Tensor:
    """Unit CLIP embeddings (N D) -> samples like each of these pictures (N V 3 S S) uint8."""
    cond = run.condition(embeddings).repeat_interleave(per_image, 0)  # N*V D
    x = sample(run, cond, mask_rate, guidance, steps, seed)
    return to_uint8(x).unflatten(0, (len(embeddings), per_image))


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """The flags of `python -m tinyanl.augment`."""

    run: Path = option(help="folder that tinyanl.train wrote")
    data: Path = option(help="pictures in a folder for each class")
    out: Path = option(help="new or empty folder for the variations")
    per_image: int = option(8, help="variations of each picture")
    mask_rate: float = option(0.3, help="hidden share of the condition")
    trained_on: Path | None = option(None, help="the folder it was trained on, if that has moved")

    def check(self) -> None:
        """ValueError for flags that cannot be, FileExistsError for an --out that is taken."""
        super().check()
        if self.per_image < 1:
            raise ValueError(f"--per-image {self.per_image} must be at least 1")
        if not 0 <= self.mask_rate <= 1:
            raise ValueError(f"--mask-rate {self.mask_rate} must be between 0 and 1")
        refuse_taken(self.out)


@dataclass(frozen=True)
class Sources:
    """The labelled pictures, and what their variations are compared with."""

    folder: Folder
    labels: Tensor  # (N,)
    embeddings: Tensor  # N D, of them
    training: Tensor  # M D, of the run's training pictures and their mirror images

    def cosines(self, x: Tensor, first: int) -> Iterator[dict[str, float]]:
        """For each variation (n V 3 S S, embedded as (n V D)) of the n pictures from `first` on:
        how like its own picture it is, how like the nearest of another class, and how like the
        nearest training picture."""
        for i, views in enumerate(x, first):  # V D
            others = self.embeddings[self.labels != self.labels[i]]
            own = F.cosine_similarity(views, self.embeddings[i : i + 1])
            other = nearest_similarity(views, others)
            copied = nearest_similarity(views, self.training)
            for figures in zip(own.tolist(), other.tolist(), copied.tolist(), strict=True):
                names = ("like it", "like another class", "like a training picture")
                yield dict(zip(names, figures, strict=True))


def read_sources(run: Run, data: Path, seen: RunPictures) -> Sources:
    """The pictures of --data, embedded, and the run's own. ValueError: they have no classes."""
    folder = scan(data, run.base.size)
    print(describe(folder))
    for note in folder.notes:
        print(f"note: {note}")
    if not folder.classes:
        raise ValueError(f"{data} has no classes: put the pictures of each into a sub-folder of "
                         "its own")
    labels = torch.tensor([picture.label for picture in folder.pictures])
    paths = [picture.path for picture in folder.pictures]
    _, embeddings = encode(run.base, paths, latents=False)  # N 2 D
    trained_on = [seen.pictures[i].path for i in seen.train_ids]
    _, training = encode(run.base, trained_on, latents=False)  # M/2 2 D
    return Sources(folder, labels, embeddings[:, 0], training.flatten(0, 1))


def save_part(x: Tensor, first: int, folder: Folder, out: Path) -> list[dict]:
    """Write the variations x (n V 3 S S) of the n pictures from `first` on into the folders of
    their classes -> a row with the file and its source for each."""
    rows = []
    for i, views in enumerate(x, first):
        source = folder.pictures[i]
        name = folder.classes[source.label]
        (out / name).mkdir(parents=True, exist_ok=True)
        for j, view in enumerate(views):
            file = Path(name, f"{i:05d}_like_{source.path.stem[:40]}_{j}.png")
            to_pil_image(view).save(out / file)
            rows.append({"file": str(file), "of": str(source.path)})
    return rows


def paint_variations(run: Run, sources: Sources, options: Options) -> list[dict]:
    """Paint and save the variations of PART pictures at a time -> a row for each of them, which
    augment.json has as soon as its picture is there. KeyboardInterrupt says how far it came."""
    setup = {"run": str(options.run), "mask rate": options.mask_rate, "DDIM steps": options.steps,
             "seed": options.seed}
    rows = []
    n = len(sources.embeddings)
    try:
        for first in range(0, n, PART):
            part = sources.embeddings[first : first + PART]
            seed = (options.seed + first) % 2**32
            x = variations(run, part, options.per_image, options.mask_rate, options.steps, seed,
                           options.guidance)
            embedded = embed_pictures(run.base, x.flatten(0, 1)).unflatten(0, x.shape[:2])  # n V D
            with noting_signals() as signals:  # they wait until these files are whole
                files = save_part(x, first, sources.folder, options.out)
                cosines = sources.cosines(embedded, first)
                rows += [file | figures for file, figures in zip(files, cosines, strict=True)]
                save(json.dumps({**setup, "pictures": rows}, indent=1),
                     options.out / "augment.json")
            if signals and first + PART < n:
                raise KeyboardInterrupt
    except KeyboardInterrupt as stop:
        kept = f"{len(rows)} of {n * options.per_image} pictures are in {options.out}"
        raise KeyboardInterrupt(f"stopped: {kept if rows else 'no picture was kept'}") from stop
    return rows


def run_command(options: Options) -> None:
    """Paint the variations that the flags ask for, and say how far they went."""
    options.check()
    options.out.mkdir(parents=True, exist_ok=True)
    run = load_run(options.run, options.weights, options.device)
    seen = training_set(run, options.trained_on)
    rows = paint_variations(run, read_sources(run, options.data, seen), options)
    likeness = sum(row["like it"] for row in rows) / len(rows)
    copied = sum(row["like a training picture"] for row in rows) / len(rows)
    strayed = sum(row["like another class"] > row["like it"] for row in rows) / len(rows)
    print(f"{len(rows)} pictures in {options.out}; cosine with their own {likeness:.3f}, with the "
          f"nearest training picture {copied:.3f}; {strayed:.1%} are more like another class")


def main(argv: list[str] | None = None) -> None:
    parser = add_options(command("augment", __doc__), Options)
    options = Options(**vars(parser.parse_args(argv)))
    with mistakes_in_one_line(parser):
        run_command(options)


if __name__ == "__main__":
    main()
