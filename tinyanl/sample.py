"""Draw pictures from a trained run: like given pictures, from words, or unconditionally.

    python -m tinyanl.sample --run runs/flowers --like photo.png --mask-rate 0.3 --n 16
    python -m tinyanl.sample --run runs/flowers --text "a red rose" "a white daisy"
"""
import argparse
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from .data import describe, scan
from .encode import embed_texts, encode
from .masking import guided, mask_condition
from .models import Run, check_seed, load_run
from .runs import command, mistakes_in_one_line
from .schedule import Denoiser, ddim, ddim_timesteps, ldm_alpha_bar


@torch.no_grad()
def denoise(bind: Callable[[Tensor], Denoiser], decode: Callable[[Tensor], Tensor], noise: Tensor, cond: Tensor,
            null: Tensor, guidance: float, steps: int, eta: float, generator: torch.Generator, batch: int) -> Tensor:
    """Noise (B C h w) and conditions (B ...), null (1 ...) -> pictures (B 3 S S) in [-1, 1] on the CPU, by DDIM."""
    pictures, alpha_bar, chunks = [], ldm_alpha_bar(), list(zip(noise.split(batch), cond.split(batch)))
    with tqdm(total=len(chunks) * steps, desc="sampling", leave=False, delay=2) as bar:
        for z, c in chunks:
            for _, z, _ in ddim(guided(bind, c, null, guidance), z, alpha_bar, steps, eta, generator):
                bar.update()
            pictures.append(decode(z).clamp(-1, 1).cpu())
    return torch.cat(pictures)


def sample(run: Run, cond: Tensor, mask_rate: float = 0.0, guidance: float = 1.0, steps: int = 50, seed: int = 0,
           eta: float = 1.0, batch: int = 32) -> Tensor:
    """Conditions (B D) -> pictures (B 3 S S) in [-1, 1], on the CPU, by DDIM. A condition of zeros is unconditional.

    eta is 1 because fresh noise at every step lets later steps repair earlier ones: after 800 steps of training on an
    earlier set of flowers, CLIP called 86 % of 64 samples flowers, and 66 % with eta 0. Noise and masks come from a
    CPU generator, so the same seed, n and batch give the same pictures on every device, to rounding."""
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(cond), *run.base.latent_shape, generator=generator)  # B C h w
    cond = mask_condition(cond, mask_rate, generator)
    return denoise(run.bind, run.base.autoencoder.decode, noise.to(run.base.device), cond, torch.zeros_like(cond[:1]),
                   guidance, steps, eta, generator, batch)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255, rounded."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


def filmstrip(columns: dict[str, Tensor], rows: Sequence[str] = ()) -> Image.Image:
    """Figure 1: label -> pictures (R 3 S S) uint8, as labelled columns; the R rows may have labels too."""
    cells, left = torch.stack(list(columns.values()), dim=1), 64 * bool(rows)  # R columns 3 S S
    strip, side = to_pil_image(make_grid(cells.flatten(0, 1), nrow=len(columns), pad_value=255)), cells.shape[-1] + 2
    image = Image.new("RGB", (left + strip.width, 12 + strip.height), "white")
    image.paste(strip, (left, 12))
    for i, label in enumerate(columns):
        ImageDraw.Draw(image).text((left + 2 + i * side, 0), label, fill="black")
    for i, label in enumerate(rows):
        ImageDraw.Draw(image).text((2, 12 + (i + 0.5) * side), label, fill="black")
    return image


def sampling_arguments(p: argparse.ArgumentParser) -> None:
    """What every command that samples from a run takes."""
    p.add_argument("--steps", type=int, default=50, help="DDIM steps, a divisor of 1000 (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    p.add_argument("--weights", type=Path, help="the base's weights folder, if it moved since training")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")


def trained_on_argument(p: argparse.ArgumentParser) -> None:
    """What the commands take that look at the pictures which a run was trained on."""
    p.add_argument("--trained-on", type=Path, metavar="DIR",
                   help="the folder it was trained on, if that moved since training")


def check_sampling(args: argparse.Namespace) -> None:
    """ValueError for steps or a seed that cannot be, before anything is loaded."""
    ddim_timesteps(len(ldm_alpha_bar()), args.steps)
    check_seed(args.seed)


def main(argv: list[str] | None = None) -> None:
    p = command("sample", __doc__)
    p.add_argument("--run", type=Path, required=True, help="folder that tinyanl.train wrote")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--like", type=Path, help="picture, or folder of pictures used in turn")
    what.add_argument("--text", nargs="+", help="prompts, used in turn; neither --like nor --text: unconditional")
    p.add_argument("--mask-rate", type=float, default=0.0, help="hidden share of the condition (default %(default)s)")
    p.add_argument("--guidance", type=float, default=1.0, help="1: none, more: exaggerates (default %(default)s)")
    p.add_argument("--n", type=int, default=16, help="pictures (default %(default)s)")
    sampling_arguments(p)
    p.add_argument("--out", type=Path, help="folder for the pictures (default: RUN/drawn_000, or the next number)")
    args = p.parse_args(argv)
    with mistakes_in_one_line(p):
        check_sampling(args)
        if not 0 <= args.mask_rate <= 1 or not math.isfinite(args.guidance):
            raise ValueError(f"--mask-rate {args.mask_rate} must be between 0 and 1, --guidance {args.guidance} finite")
        if args.n < len(args.text or [0]):
            raise ValueError(f"--n {args.n}: at least 1, and one for each prompt")
        if not all(text.strip() for text in args.text or []):
            raise ValueError('an empty prompt: leave --text out for unconditional pictures')
        numbered = (args.run / f"drawn_{i:03d}" for i in itertools.count())
        out = args.out or next(folder for folder in numbered if not folder.exists())  # earlier pictures stay
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"{out} already holds something: choose another --out")
        run = load_run(args.run, args.weights, args.device)
        if args.like:
            folder = scan(args.like, run.base.size)
            print(f"like: {describe(folder)}")
            for note in folder.notes:
                print(f"note: {note}")
            paths = [picture.path for picture in folder.pictures[: args.n]]
            cond = run.condition(encode(run.base, paths, latents=False)[1][:, 0])
        elif args.text:
            cond = run.condition(embed_texts(run.base, args.text), text=True)
        else:
            cond = torch.zeros(1, run.base.clip.dim, device=run.base.device)
        cond = cond[torch.arange(args.n) % len(cond)]  # n D
        x = to_uint8(sample(run, cond, args.mask_rate, args.guidance, args.steps, args.seed))
        out.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(x):
            to_pil_image(picture).save(out / f"{i:04d}.png")
        to_pil_image(make_grid(x, nrow=max(1, round(args.n**0.5)), pad_value=255)).save(out / "grid.png")
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        (out / "sample.json").write_text(json.dumps(settings, indent=1) + "\n")
    print(f"{args.n} pictures and {out / 'grid.png'}")


if __name__ == "__main__":
    main()
