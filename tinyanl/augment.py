"""Variations of labelled pictures: masked samples like each of them, in its class folder.

    python -m tinyanl.augment --run runs/flowers --data ./labelled --per-image 8 --out ./more

A sample keeps its picture's class: ./more/daisy/00012_like_a_3.png. Hidden coordinates of the condition (--mask-rate)
make it vary. Whether it has strayed from its class, or copies a picture that the run was trained on, is printed and
kept in augment.json: the cosine of its CLIP embedding with that of its own picture, of the nearest one of another
class, and of the nearest training picture.
"""
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from .data import describe, scan
from .encode import embed_pictures, encode
from .metrics import nearest_similarity
from .models import Run, load_run, training_set
from .runs import command, mistakes_in_one_line, save
from .sample import check_sampling, sample, sampling_arguments, to_uint8, trained_on_argument

PART = 32  # pictures whose variations are painted and saved together


def augment(run: Run, paths: list[Path], per_image: int = 8, mask_rate: float = 0.3, steps: int = 50,
            seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures -> samples like each (N per_image 3 S S) uint8, and the pictures' unit CLIP embeddings (N D)."""
    embeddings = encode(run.base, paths, latents=False)[1][:, 0]                              # N D
    cond = run.condition(embeddings).repeat_interleave(per_image, 0)                          # N*per_image D
    x = to_uint8(sample(run, cond, mask_rate, steps=steps, seed=seed))
    return x.unflatten(0, (len(paths), per_image)), embeddings


def main(argv: list[str] | None = None) -> None:
    p = command("augment", __doc__)
    p.add_argument("--run", type=Path, required=True, help="folder that tinyanl.train wrote")
    p.add_argument("--data", type=Path, required=True, help="pictures in a folder for each class")
    p.add_argument("--out", type=Path, required=True, help="new or empty folder for the variations")
    p.add_argument("--per-image", type=int, default=8, help="variations of each picture (default %(default)s)")
    p.add_argument("--mask-rate", type=float, default=0.3, help="hidden share of the condition (default %(default)s)")
    trained_on_argument(p)
    sampling_arguments(p)
    args = p.parse_args(argv)
    with mistakes_in_one_line(p):
        if args.per_image < 1 or not 0 <= args.mask_rate <= 1:
            raise ValueError(f"--per-image {args.per_image} must be at least 1, --mask-rate {args.mask_rate} in [0, 1]")
        if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise FileExistsError(f"{args.out} is not empty: choose a new name")
        check_sampling(args)
        args.out.mkdir(parents=True, exist_ok=True)
        run = load_run(args.run, args.weights, args.device)
        training, train_ids, _ = training_set(run, args.trained_on)
        folder = scan(args.data, run.base.size)
        print(describe(folder))
        for note in folder.notes:
            print(f"note: {note}")
        if not folder.classes:
            raise ValueError(f"{args.data} has no classes: put the pictures of each into a sub-folder of its own")
        paths, labels = [picture.path for picture in folder.pictures], torch.tensor([p.label for p in folder.pictures])
        rows, ours, sources = [], [], []
        for start in range(0, len(paths), PART):
            part, seed = paths[start : start + PART], args.seed + start
            x, own = augment(run, part, args.per_image, args.mask_rate, args.steps, seed % 2**32)
            for i, pictures in enumerate(x, start):
                (args.out / (name := folder.classes[labels[i]])).mkdir(parents=True, exist_ok=True)
                for j, picture in enumerate(pictures):
                    file = Path(name, f"{i:05d}_like_{paths[i].stem[:40]}_{j}.png")
                    to_pil_image(picture).save(args.out / file)
                    rows.append({"file": str(file), "of": str(paths[i])})
            ours.append(embed_pictures(run.base, x.flatten(0, 1)).unflatten(0, x.shape[:2]))
            sources.append(own)
        ours, sources = torch.cat(ours), torch.cat(sources)                                   # N per_image D, N D
        trained_on = encode(run.base, [training[i].path for i in train_ids], latents=False)[1]
        likeness = F.cosine_similarity(ours, sources[:, None], dim=-1)                        # N per_image
        copied = nearest_similarity(ours.flatten(0, 1), trained_on.flatten(0, 1)).view_as(likeness)
        other = torch.stack([nearest_similarity(own, sources[labels != label]) for own, label in zip(ours, labels)])
        for row, *cosines in zip(rows, *(x.flatten().tolist() for x in (likeness, other, copied))):
            row.update(zip(("like it", "like another class", "like a training picture"), cosines))
        setup = {"run": str(args.run), "mask rate": args.mask_rate, "DDIM steps": args.steps, "seed": args.seed}
        save(json.dumps({**setup, "pictures": rows}, indent=1), args.out / "augment.json")
        strayed = (other > likeness).float().mean()
        print(f"{len(rows)} pictures in {args.out}; cosine with their own {likeness.mean():.3f}, with the nearest "
              f"training picture {copied.mean():.3f}; {strayed:.1%} are more like another class")


if __name__ == "__main__":
    main()
