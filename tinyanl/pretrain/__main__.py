"""Pretrain a small latent diffusion model and its CLIP, into a folder of weights as released.

    python -m tinyanl.pretrain clip --data emoji more_flowers --out weights/mine
    python -m tinyanl.pretrain autoencoder --data emoji more_flowers --out weights/mine
    python -m tinyanl.pretrain unet --data emoji --out weights/mine
    python -m tinyanl.pretrain families --data emoji --out .

In this order: CLIP is the critic of the autoencoder, whose latents the U-Net learns. `families`
writes ./faces and ./vehicles, pictures to transfer to. art.py says what a data folder holds; a
"label" is a class of the U-Net. Every tenth picture is kept from CLIP and the autoencoder, to
measure them on, and some families from the U-Net. The same command goes on with a part that was
stopped. OUT/training shows what each part can do. All randomness comes from the seed and the
number of the step.
"""
import argparse
import math
from pathlib import Path

from ..models import check_seed
from ..runs import claim, command, mistakes_in_one_line
from .autoencoder import train_autoencoder
from .clip import train_clip
from .families import write_families
from .unet import train_unet


def parser() -> argparse.ArgumentParser:
    """The command line: `work` is the function of the part that was asked for."""
    p = command("pretrain", __doc__)
    parts = p.add_subparsers(dest="part", required=True)
    clip = parts.add_parser("clip", description=train_clip.__doc__)
    clip.set_defaults(work=train_clip)
    autoencoder = parts.add_parser("autoencoder", description=train_autoencoder.__doc__)
    autoencoder.set_defaults(work=train_autoencoder)
    unet = parts.add_parser("unet", description=train_unet.__doc__)
    unet.set_defaults(work=train_unet)
    families = parts.add_parser("families", description=write_families.__doc__)
    families.set_defaults(work=write_families)

    for part in (clip, autoencoder, unet, families):
        part.add_argument(
            "--data", type=Path, nargs="+", required=True, help="folders, drawn from equally often"
        )
        part.add_argument("--out", type=Path, required=True, help="folder to write to")
        part.add_argument(
            "--seed", type=int, default=0, help="of all randomness (default %(default)s)"
        )
    for part, steps, batch in ((clip, 1500, 256), (autoencoder, 2600, 32), (unet, 5500, 128)):
        part.add_argument(
            "--steps", type=int, default=steps, help="optimizer steps (default %(default)s)"
        )
        part.add_argument(
            "--batch", type=int, default=batch, help="pictures a step (default %(default)s)"
        )
        part.add_argument(
            "--lr", type=float, default=1e-3, help="highest learning rate (default %(default)s)"
        )
        part.add_argument(
            "--fast", action="store_true", help="bf16 autocast and torch.compile"
        )
    for part in (autoencoder, unet):
        part.add_argument(
            "--init", type=Path, help="folder of the ldm.ckpt to start from (default: from scratch)"
        )
    unet.add_argument(
        "--looks", type=int, default=32768, help="latents to train on (default %(default)s)"
    )
    return p


def main(argv: list[str] | None = None) -> None:
    p = parser()
    args = vars(p.parse_args(argv))
    for name, least in (("steps", 1), ("batch", 1), ("looks", 2)):
        if args.get(name, least) < least:
            p.error(f"--{name} {args[name]} must be at least {least}")
    if not 0 < args.get("lr", 1) < math.inf:
        p.error(f"--lr {args['lr']} must be positive and finite")
    del args["part"]
    work = args.pop("work")
    with mistakes_in_one_line(p, "stopped: the same command goes on from what was saved"):
        check_seed(args["seed"])
        with claim(args["out"]):
            for name, figure in work(**args).items():
                print(f"{name}: {figure:.4g}")


if __name__ == "__main__":
    main()
