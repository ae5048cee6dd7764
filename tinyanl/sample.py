"""Draw pictures from a trained run: like given pictures, from words, or unconditionally.

    python -m tinyanl.sample --run runs/flowers --like photo.png --mask-rate 0.3 --n 16
    python -m tinyanl.sample --run runs/flowers --text "a red rose" "a white daisy"

B pictures, C h w latent, S picture side, D CLIP embedding width.
"""
import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from .options import add_options, option
from .runs import command, mistakes_in_one_line, noting_signals
from .schedule import Denoiser, ddim, ddim_timesteps, ldm_alpha_bar

GRID = 256  # pictures in grid.png at most
GUIDANCE = 2.0  # of samples, unless another is asked for: `sample` says what it does
STEPS = 25  # of DDIM


@torch.no_grad()
def denoise(bind: Callable[[Tensor], Denoiser], decode: Callable[[Tensor], Tensor], noise: Tensor,
            cond: Tensor, null: Tensor, guidance: float, steps: int, eta: float,
            generator: torch.Generator, batch: int) -> Iterator[Tensor]:
    """Noise (N C h w) and conditions (N ...), null (1 ...) -> pictures by DDIM, in [-1, 1] on the
    CPU, in batches (B 3 S S) as soon as they are decoded. The noise of a step (eta > 0) is drawn
    batch by batch, from the generator that drew the first one."""
    alpha_bar = ldm_alpha_bar()
    parts = list(zip(noise.split(batch), cond.split(batch), strict=True))
    with tqdm(total=len(parts) * steps, desc="sampling", leave=False, delay=2) as bar:
        for z, c in parts:
            model = guided(bind, c, null, guidance)
            for _, z_next, _ in ddim(model, z.to(c.device), alpha_bar, steps, eta, generator):
                z = z_next
                bar.update()
            yield decode(z).clamp(-1, 1).cpu()


def sample_batches(run: Run, cond: Tensor, mask_rate: float = 0.0, guidance: float = GUIDANCE,
                   steps: int = STEPS, seed: int = 0, eta: float = 1.0,
                   batch: int = 32) -> Iterator[Tensor]:
    """What `sample` returns, in batches as soon as they are decoded: of 50,000 pictures of 256
    pixels, all at once would take 39 GB."""
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(cond), *run.base.latent_shape, generator=generator)  # N C h w
    cond = mask_condition(cond, mask_rate, generator).to(run.base.device)
    return denoise(run.bind, run.base.autoencoder.decode, noise, cond,
                   null=torch.zeros_like(cond[:1]), guidance=guidance, steps=steps, eta=eta,
                   generator=generator, batch=batch)


def sample(run: Run, cond: Tensor, mask_rate: float = 0.0, guidance: float = GUIDANCE,
           steps: int = STEPS, seed: int = 0, eta: float = 1.0, batch: int = 32) -> Tensor:
    """Conditions (N D) -> pictures (N 3 S S) in [-1, 1], on the CPU, by DDIM. A condition of zeros
    is unconditional.

    eta is 1 because fresh noise at every step lets later steps repair earlier ones: after 800 steps
    of training on an earlier set of flowers, CLIP called 86 % of 64 samples flowers, and 66 % with
    eta 0. Noise and masks come from a CPU generator, so the same seed, N and batch give the same
    pictures on every device, to rounding.

    Guidance buys right answers with variety. Of 256 samples from held-out conditions, with one
    seed, kind and colour were both right in 35 % at guidance 1, 53 % at 2 (54 % with 50 steps) and
    61 % at 3, to a judge that wants them crisp, and recall was 0.11 at 2 and 0.08 at 3.
    """
    return torch.cat(list(sample_batches(run, cond, mask_rate, guidance, steps, seed, eta, batch)))


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0 ... 255, rounded."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


def filmstrip(columns: dict[str, Tensor], rows: Sequence[str] = ()) -> Image.Image:
    """Figure 1: label -> pictures (R 3 S S) uint8, as labelled columns; the R rows may have labels
    too."""
    cells = torch.stack(list(columns.values()), dim=1)  # R columns 3 S S
    strip = to_pil_image(make_grid(cells.flatten(0, 1), nrow=len(columns), pad_value=255))
    side = cells.shape[-1] + 2
    top = 12
    left = 64 if rows else 0
    image = Image.new("RGB", (left + strip.width, top + strip.height), "white")
    image.paste(strip, (left, top))
    pen = ImageDraw.Draw(image)
    for i, label in enumerate(columns):
        pen.text((left + 2 + i * side, 0), label, fill="black")
    for i, label in enumerate(rows):
        pen.text((2, top + (i + 0.5) * side), label, fill="black")
    return image


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The flags of every command that samples from a run."""

    guidance: float = option(GUIDANCE, help="1: none, more: exaggerates the condition")
    steps: int = option(STEPS, help="DDIM steps, a divisor of 1000")
    seed: int = option(0, help="of everything random")
    weights: Path | None = option(None, help="the base's weights folder, if it has moved")
    device: str | None = option(None, help="cuda, mps or cpu (default: the first there is)")

    def check(self) -> None:
        """ValueError for guidance, steps or a seed that cannot be, before anything is loaded."""
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance {self.guidance} must be finite")
        ddim_timesteps(len(ldm_alpha_bar()), self.steps)
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """The flags of `python -m tinyanl.sample`."""

    run: Path = option(help="folder that tinyanl.train wrote")
    like: Path | None = option(None, help="picture, or folder of pictures used in turn")
    text: tuple[str, ...] | None = option(
        None, help="prompts, used in turn; neither --like nor --text: unconditional")
    mask_rate: float = option(0.0, help="hidden share of the condition")
    n: int = option(16, help="pictures")
    out: Path | None = option(
        None, help="folder for the pictures (default: RUN/drawn_000, or the next number)")

    def check(self) -> None:
        """ValueError for flags that cannot be, FileExistsError for an --out that is taken."""
        super().check()
        if not 0 <= self.mask_rate <= 1:
            raise ValueError(f"--mask-rate {self.mask_rate} must be between 0 and 1")
        if self.n < 1:
            raise ValueError(f"--n {self.n} must be at least 1")
        if self.like and self.text:
            raise ValueError("--like or --text, not both")
        if self.text and self.n < len(self.text):
            raise ValueError(f"--n {self.n}: at least one for each of the {len(self.text)} prompts")
        if self.text and not all(text.strip() for text in self.text):
            raise ValueError("an empty prompt: leave --text out for unconditional pictures")
        refuse_taken(self.folder())

    def folder(self) -> Path:
        """The folder for the pictures: --out, or the first number that is free, as earlier
        pictures stay."""
        if self.out:
            return self.out
        numbered = (self.run / f"drawn_{i:03d}" for i in itertools.count())
        return next(folder for folder in numbered if not folder.exists())


def refuse_taken(out: Path) -> None:
    """FileExistsError: pictures cannot go into `out`, as something else is there."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not empty, it already holds something: give "
                              "another --out")


def conditions(run: Run, options: Options) -> Tensor:
    """What the pictures are to be like, (n D): pictures, prompts, or nothing, taken in turn."""
    if options.like:
        folder = scan(options.like, run.base.size)
        print(f"like: {describe(folder)}")
        for note in folder.notes:
            print(f"note: {note}")
        paths = [picture.path for picture in folder.pictures[: options.n]]
        _, embeddings = encode(run.base, paths, latents=False)
        cond = run.condition(embeddings[:, 0])
    elif options.text:
        cond = run.condition(embed_texts(run.base, list(options.text)), text=True)
    else:
        cond = torch.zeros(1, run.base.clip.dim, device=run.base.device)
    return cond[torch.arange(options.n) % len(cond)]


def save_pictures(batches: Iterator[Tensor], n: int, out: Path) -> None:
    """Write n pictures as they come, and grid.png of the first GRID. KeyboardInterrupt says how
    many there are, all of them whole."""
    done = 0
    shown = []
    stopped = False
    try:
        for batch in batches:
            x = to_uint8(batch)  # B 3 S S
            with noting_signals() as signals:  # they wait until these files are whole
                for picture in x:
                    to_pil_image(picture).save(out / f"{done:04d}.png")
                    done += 1
            if len(shown) < GRID:
                shown.extend(x[: GRID - len(shown)])
            if signals and done < n:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        stopped = True
    if shown:
        columns = max(1, round(len(shown) ** 0.5))
        grid = make_grid(torch.stack(shown), nrow=columns, pad_value=255)
        to_pil_image(grid).save(out / "grid.png")
    if stopped:
        kept = f"{done} of {n} pictures are in {out}" if done else "no picture was finished"
        raise KeyboardInterrupt(f"stopped: {kept}")


def run_command(options: Options) -> None:
    """Draw the pictures that the flags ask for."""
    options.check()
    out = options.folder()
    run = load_run(options.run, options.weights, options.device)
    cond = conditions(run, options)  # n D
    out.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) if isinstance(value, Path) else value
                for name, value in dataclasses.asdict(options).items()}
    (out / "sample.json").write_text(json.dumps(settings, indent=1) + "\n")
    batches = sample_batches(run, cond, options.mask_rate, options.guidance, options.steps,
                             options.seed)
    with contextlib.closing(batches):
        save_pictures(batches, options.n, out)
    print(f"{options.n} pictures and {out / 'grid.png'}")


def main(argv: list[str] | None = None) -> None:
    parser = add_options(command("sample", __doc__), Options)
    options = Options(**vars(parser.parse_args(argv)))
    with mistakes_in_one_line(parser):
        run_command(options)


if __name__ == "__main__":
    main()
