"""Transfer a pretrained latent diffusion model to a folder of pictures, by training small
Attention-NonLinear (ANL) modules inserted into it, or the parts of it that --tune names.

    python -m tinyanl.flowers ./flowers && python -m tinyanl.train --data ./flowers
    python -m tinyanl.train --data ./birds --weights weights/imagenet256 --steps 4000
    torchrun --nproc-per-node 4 -m tinyanl.train --data ./birds --weights weights/imagenet256

The first stage and CLIP stay frozen; with --tune anl the U-Net is frozen as well. Pictures are
encoded once, with their mirror images; a tenth of them is held out. Training then draws (latent,
embedding) pairs from memory and minimises |eps - eps_hat(z_t, t, cond)|^2, DDPM eq. (14), with
min-SNR-5 weights (Hang et al. 2023) and a learning rate that falls to 0 by a half cosine. Half of
the conditions are partly masked (--train-mask): our addition, the paper masks at sampling only.
Masked sampling then gains diversity for a smaller loss of fidelity, but pictures follow prompts
less well (tutorials/09_masks.ipynb). With torchrun each process takes a part of every batch.
B batch, R rows of a grid, S picture side, D CLIP embedding width.
"""
import contextlib
import copy
import dataclasses
import json
import math
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from .data import Folder, describe, open_rgb, scan, to_square
from .dataset import COND_DROP, Batch, T, TrainingData, encode_folder
from .loss import Loss, curve_loss, gradients
from .models import Base, Run, check_seed, load_base, split
from .options import add_options, option
from .page import page
from .runs import (
    claim,
    command,
    earlier_state,
    is_first_process,
    join_processes,
    memory_advice,
    mistakes_in_one_line,
    noting_signals,
    peak_megabytes,
    remove_stale,
    save,
    say,
)
from .sample import filmstrip, sample, to_uint8
from .tune import DEAD, TUNES, trained, tunable, unet_of

SWEPT = "by a sweep on drawn flowers: tutorials/results.json"  # 250 steps, lowest held-out loss
LEARNING_RATES = {"anl": 3e-3, "attention": 1e-3, "all": 3e-4, "scratch": 1e-3, "deep": 1e-3,
                  "shallow": 1e-3, "uncond": 1e-3}
RELEASED_LEARNING_RATE = 1e-4
UNMEASURED = "base_learning_rate of LDM's cin256-v2; no rate was measured here"
WEIGHT_DECAY = 0.01  # torch's default for AdamW; none was compared here
EMA_DECAY = 0.995  # of the weights that are saved and sampled; at first (1 + step) / (10 + step)
ROWS = 8  # held-out pictures that are shown: columns of a grid, rows of the filmstrip
LOG_EVERY = 50  # steps


@dataclasses.dataclass(frozen=True)
class Options:
    """What training can be told: the flags of the command, and the fields of config.json.

    Fields marked `kept` are written to config.json and must be the same when a run is resumed,
    unless they are marked `may_change`. ValueError for a value that cannot be."""

    data: Path = option(help="folder of pictures, any nesting, or with captions", kept=True,
                        may_change=True)
    weights: Path | None = option(
        None, help="folder of released weights (default: the embedded emoji64)", kept=True)
    tune: str = option("anl", help="what is trained", choices=tuple(TUNES), kept=True)
    steps: int = option(400, help="optimizer steps")
    batch: int = option(32, help="pictures a step", kept=True, may_change=True)
    accumulate: int = option(1, help="parts that a batch is computed in, to need less memory")
    checkpoint: bool = option(
        False, help="keep few activations and compute them twice: less memory")
    lr: float | None = option(
        None, help="highest learning rate (default: as measured, said at the start)", kept=True,
        may_change=True)
    tokens: int = option(1, help="condition tokens K", kept=True)
    ratio: int = option(4, help="relative width of the mapping", kept=True)
    train_mask: float = option(0.5, help="share of the conditions that is partly masked",
                               kept=True, may_change=True)
    out: Path | None = option(None, help="run folder (default: runs/ and the data folder's name)")
    resume: bool = option(False, help="continue the run in --out; at 0 where there is none")
    overwrite: bool = option(False, help="replace the run in --out")
    sample_every: int | None = option(
        None, help="steps between sample grids (default: an eighth of the steps)")
    save_every: int | None = option(
        None, help="steps between saves (default: as --sample-every)")
    seed: int = option(0, help="of everything random", kept=True)
    device: str | None = option(None, help="cuda, mps or cpu (default: the first there is)")
    compile: bool = option(False, help="torch.compile the training step")
    uncentred: bool = option(
        False, help="do not subtract the mean embedding, to compare", kept=True)
    dry_run: bool = option(False, help="say everything, time three steps, write nothing")

    def __post_init__(self) -> None:
        if self.tune not in TUNES:
            raise ValueError(f"tune={self.tune!r} must be one of {', '.join(TUNES)}")
        for name in ("steps", "batch", "tokens", "ratio", "sample_every", "save_every",
                     "accumulate"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}: at least 1")
        if not 0 <= self.train_mask <= 1 - COND_DROP:
            raise ValueError(f"train_mask={self.train_mask} must be between 0 and {1 - COND_DROP}, "
                             f"since {COND_DROP} of the conditions are dropped")
        if self.lr is not None and not 0 < self.lr < 1:
            raise ValueError(f"lr={self.lr} must be between 0 and 1")
        check_seed(self.seed)
        if self.resume and self.overwrite:
            raise ValueError("resume continues a run, overwrite replaces it: choose one of them")

    @property
    def folder(self) -> Path:
        """Where the run is left."""
        return Path(self.out or Path("runs") / Path(self.data).resolve().name)

    @property
    def grid_steps(self) -> int:
        """Steps between sample grids."""
        return self.sample_every or max(1, self.steps // 8)

    @property
    def save_steps(self) -> int:
        """Steps between saves."""
        return self.save_every or self.grid_steps

    def learning_rate(self) -> tuple[float, str]:
        """The highest learning rate, and where it comes from."""
        if self.lr is not None:
            return self.lr, "given"
        if self.weights is not None:
            small = f"for weights as small as emoji64 give --lr {LEARNING_RATES[self.tune]:g}"
            return RELEASED_LEARNING_RATE, f"{UNMEASURED}; {small}"
        return LEARNING_RATES[self.tune], SWEPT

    def config(self) -> dict:
        """What config.json and adapter.pt keep."""
        config = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                  if field.metadata.get("kept")}
        config["data"] = str(self.data)
        config["weights"] = str(self.weights) if self.weights is not None else None
        config["lr"] = self.learning_rate()[0]
        return config

    def check_surroundings(self, world: int) -> None:
        """ValueError: a batch does not split, or the run would train on its own pictures.
        FileNotFoundError: there is no such data."""
        parts = world * self.accumulate
        if self.batch % parts:
            raise ValueError(f"batch={self.batch} does not split into {parts} equal parts, "
                             f"{self.accumulate} for each of {world} processes: choose another")
        data = Path(self.data)
        if not data.exists():
            raise FileNotFoundError(f"{data} does not exist: name a folder of pictures, or draw "
                                    "one (tinyanl.flowers)")
        if self.folder.resolve().is_relative_to(data.resolve()):
            raise ValueError(f"the run folder {self.folder} lies inside the data folder {data}, so "
                             "it would train on its own pictures: choose an --out outside")


MAY_CHANGE = {field.name for field in dataclasses.fields(Options)
              if field.metadata.get("may_change")}


class State:
    """What training changes: the live tensors and their average, AdamW's moments, the step, and
    what was logged and painted so far."""

    def __init__(self, run: Run, fingerprints: dict[str, str]):
        self.run = run
        self.fingerprints = fingerprints  # of the base, to refuse another one on --resume
        self.average = dataclasses.replace(run, model=copy.deepcopy(run.model))
        self.live = tensors(run.model)
        self.ema = tensors(self.average.model)
        self.average.model.requires_grad_(False)
        self.parameters = with_effect(run.model, run.config["tokens"])
        self.optimizer = torch.optim.AdamW(self.parameters, weight_decay=WEIGHT_DECAY)
        self.step = 0
        self.losses: list[float] = []  # since the last line of the log
        self.log: list[dict] = []
        self.frames: dict[int, Tensor] = {}  # step -> samples (R 3 S S) uint8

    def update(self, loss: float, lr: float) -> None:
        """Take an optimizer step along the gradients, and move the average after it."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.values()), list(self.live.values()), 1 - decay)
        self.losses.append(loss)
        self.step += 1

    def is_due(self, every: int, steps: int) -> bool:
        """Whether something that happens every so many steps, and at the end, is due now."""
        return self.step % every == 0 or self.step == steps

    def must_match(self) -> dict:
        """What a run that is resumed must find again."""
        return {"weights": self.fingerprints, "pictures": self.run.pictures,
                "files": self.run.files}

    def state_dict(self) -> dict:
        """What state.pt holds: everything that resuming needs."""
        return {"step": self.step, "live": self.live, "ema": self.ema,
                "optimizer": self.optimizer.state_dict(), "frames": self.frames, "log": self.log,
                "losses": self.losses, "same": self.must_match(), "config": self.run.config}

    def load_state_dict(self, state: dict) -> None:
        """Go on from another run's state. ValueError: it has other pictures or another base."""
        mine = self.must_match()
        # what an older state did not keep counts as equal
        differing = [name for name in mine if state["same"].get(name, mine[name]) != mine[name]]
        if differing:
            kinds = sorted({"weights" if name == "weights" else "pictures" for name in differing})
            raise ValueError(f"the run was trained on other {' and '.join(kinds)} than there are "
                             "now: put them back, or give --out for a new run")
        for name in self.live:
            self.live[name].copy_(state["live"][name])
            self.ema[name].copy_(state["ema"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.losses = state["losses"]
        self.log = state["log"]
        self.frames = state["frames"]

    def adapter(self) -> dict:
        """What adapter.pt holds: everything that sampling needs."""
        run = self.run
        return {"step": self.step, "trained": self.ema, "config": run.config,
                "fingerprints": self.fingerprints, "pictures": run.pictures, "files": run.files,
                "mu": run.mu, "sigma": run.sigma, "mu_text": run.mu_text}

    def save(self, out: Path) -> None:
        """Leave both files; state.pt is what counts, adapter.pt follows from it."""
        save(self.state_dict(), out / "state.pt")
        save(self.adapter(), out / "adapter.pt")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The values of the tensors that train, by name."""
    return {name: p.data for name, p in trained(model).items()}


def with_effect(model: nn.Module, tokens: int) -> list[nn.Parameter]:
    """The tensors that train and can change anything: with one condition token some cannot."""
    return [p for name, p in trained(model).items() if tokens > 1 or not DEAD.search(name)]


class Examples(NamedTuple):
    """The held-out pictures that every grid and the filmstrip are painted after."""

    pictures: Tensor  # R 3 S S, uint8
    cond: Tensor  # R D


def choose_examples(data: TrainingData, folder: Folder, size: int) -> Examples:
    """The first ROWS held-out pictures, used in turn where there are fewer."""
    ids = data.held_ids[torch.arange(ROWS) % len(data.held_ids)]
    pictures = [to_square(open_rgb(folder.pictures[i].path), size) for i in ids.tolist()]
    return Examples(to_uint8(torch.stack(pictures)), data.cond[ids, 0])  # 0: not mirrored


def draw(state: State, examples: Examples, seed: int, out: Path) -> None:
    """Paint after the examples with the averaged weights. Write their grid, originals above and
    samples below, and the filmstrip of the paper's Figure 1: a row per held-out condition, a column
    per checkpoint."""
    pictures, cond = examples
    cond = cond.to(state.run.base.device)
    painted = to_uint8(sample(state.average, cond, seed=seed))  # R 3 S S
    state.frames[state.step] = painted
    both = torch.cat([pictures, painted])
    grid = make_grid(both, nrow=len(pictures), pad_value=255)
    save(to_pil_image(grid), out / "samples" / f"step_{state.step:06d}.png")
    columns = {"like": pictures} | {str(step): frame for step, frame in state.frames.items()}
    save(filmstrip(columns), out / "filmstrip.png")


def gather_options(options: Options | str | Path | None, flags: dict[str, object]) -> Options:
    """What train() was told, in whichever way. TypeError: Options and flags besides."""
    if isinstance(options, Options):
        if flags:
            raise TypeError(f"train(Options(...)) takes no flags besides: {', '.join(flags)}")
        return options
    if options is None:
        return Options(**flags)
    return Options(options, **flags)  # a path: the data


def train(options: Options | str | Path | None = None, *,
          watch: Callable[[Run], dict[str, float]] | None = None, **flags: object) -> Path:
    """Train -> the run folder: config.json, adapter.pt (what was trained, averaged: for sampling),
    state.pt (for resuming), log.jsonl, samples/, filmstrip.png and index.html, which shows them.

    train(Options(data="flowers")) and train(data="flowers") are the same. watch: what it says of
    the averaged model is logged, too. Raises ValueError or OSError, in one sentence that says what
    to mend, before anything slow where it can, and KeyboardInterrupt after a signal to stop, when
    it has saved."""
    options = gather_options(options, flags)
    rank, world = join_processes()
    options.check_surroundings(world)
    with run_folder(options, rank, world) as (out, earlier):
        # what there is: the frozen base, the pictures, what is to be trained
        base = load_base(options.weights, options.device)
        folder = scan(options.data, base.size)
        model = fresh_model(options, base)
        announce(options, base, folder, model, world)
        if options.dry_run:
            time_steps(options, base, model, world)
            return out

        # everything frozen that depends on a picture alone is computed once
        data = encode_folder(base, folder, Path(options.data), options.seed,
                             centred=not options.uncentred, cache=out / "cache")
        state = fresh_state(options, base, model, data)
        base = state.run.base
        examples = choose_examples(data, folder, base.size)
        begin(state, earlier, examples, options, out)

        curves = {name: batch.to(base.device) for name, batch in data.curves().items()}
        loss_of = loss_function(options, state.run, world)
        batch = data.batch(state.step, options.batch, options.train_mask)
        with progress(options, state, rank) as bar, noting_signals() as signals:
            for step in bar:
                lr = cosine(options.learning_rate()[0], step, options.steps)
                state.optimizer.zero_grad()
                loss = gradients(loss_of, batch.to(base.device), options.accumulate, rank, world)
                norm = torch.nn.utils.clip_grad_norm_(state.parameters, 1.0)
                # a GPU still computes: draw what it needs next before waiting for its numbers
                following = data.batch(step + 1, options.batch, options.train_mask)
                loss, norm, stop = read_numbers(loss, norm, len(signals), world)
                if not math.isfinite(loss + norm):
                    keep(options, state, out)
                    raise ValueError(not_finite(step, loss, norm, lr, data, batch))
                state.update(loss, lr)
                batch = following

                # what is due after so many steps
                if state.is_due(LOG_EVERY, options.steps):
                    log(state, curves, watch, bar, out, rank, world)
                if state.is_due(options.grid_steps, options.steps) and rank == 0:
                    draw(state, examples, options.seed, out)
                if state.is_due(options.save_steps, options.steps) or stop:
                    keep(options, state, out, bar)
                if stop and state.step < options.steps:
                    raise KeyboardInterrupt(f"stopped and saved at step {state.step}: "
                                            "the same command with --resume goes on")
    conclude(options, base.device, out)
    return out


def fresh_model(options: Options, base: Base) -> nn.ModuleDict:
    """What is trained, as it starts for this seed."""
    torch.manual_seed(options.seed)
    return tunable(base, options.tune, options.tokens, options.ratio).to(base.device)


def fresh_state(options: Options, base: Base, model: nn.ModuleDict, data: TrainingData) -> State:
    """The state before the first step."""
    run = Run(training_base(options, base), model, data.mu, data.mu_text, data.sigma,
              options.config(), data.names, data.files)
    return State(run, base.fingerprints())


def training_base(options: Options, base: Base) -> Base:
    """The base as training computes with it. Where the U-Net stays frozen and computes in bf16, its
    weights are rounded once and not at every step, to the same numbers."""
    if options.tune == "anl" and base.bf16:
        return base.rounded
    return base


@contextlib.contextmanager
def run_folder(options: Options, rank: int, world: int) -> Iterator[tuple[Path, dict | None]]:
    """Hold the run folder, for this process alone, and say what is to be resumed in it.

    torchrun's processes all look before the first of them writes. Where memory runs out inside,
    the error says what to try."""
    out = options.folder
    advice = "try --accumulate 2, --checkpoint or a smaller --batch, and --resume"
    with contextlib.ExitStack() as stack:
        if rank == 0 and not options.dry_run:
            stack.enter_context(claim(out))
        earlier = earlier_state(out, options.config(), MAY_CHANGE, options.resume,
                                options.overwrite)
        if world > 1:
            torch.distributed.barrier()
        with memory_advice(advice):
            yield out, earlier
    if world > 1:
        torch.distributed.destroy_process_group()


def announce(options: Options, base: Base, folder: Folder, model: nn.ModuleDict,
             world: int) -> None:
    """Say what was found, what is trained, and how."""
    _, held_ids = split([picture.path for picture in folder.pictures], options.seed)
    unet = unet_of(base, model)
    train_count = sum(p.numel() for p in trained(model).values())
    total = sum(p.numel() for p in {*model.parameters(), *unet.parameters()})
    idle = train_count - sum(p.numel() for p in with_effect(model, options.tokens))
    trainable = (f"{train_count:,} parameters ({options.tune}), {train_count / total:.0%} of the "
                 f"total {total:,}")
    if idle:
        trainable += f"; {idle:,} of them have no effect at one condition token"
    parts = world * options.accumulate
    batch = f"{options.batch} in {parts} parts" if parts > 1 else f"{options.batch}"
    lr, source = options.learning_rate()
    say(f"data       {describe(folder)}; {len(held_ids)} held out")
    say(f"base       {base.name}")
    say(f"sizes      {base.size} px pictures, latents {base.latent_shape}, "
        f"condition of {base.clip.dim} numbers")
    say(f"device     {base.device}, {'bf16 autocast' if base.bf16 else 'float32'}")
    say(f"trainable  {trainable}")
    say(f"training   {options.steps} steps, effective batch {batch}, learning rate {lr:g} "
        f"({source}) falling to 0, weight decay {WEIGHT_DECAY}")
    if not options.dry_run:
        say(f"pictures   open {options.folder / 'index.html'} in a browser to watch")
    for path, reason in folder.skipped[5:]:  # the first line names the first five
        say(f"skipped    {str(path)!r}: {reason}")
    for note in folder.notes:
        say(f"note       {note}")


def time_steps(options: Options, base: Base, model: nn.ModuleDict, world: int) -> None:
    """Say how long a step takes and how much memory it needs, from three steps on noise."""
    mean = torch.zeros(base.clip.dim)
    run = Run(training_base(options, base), model, mean, mean, 1.0, options.config(), [])
    state = State(run, fingerprints={})
    loss_of = loss_function(options, run, world=1)
    size = options.batch // world
    z0 = torch.randn(size, *base.latent_shape)
    cond = torch.randn(size, base.clip.dim)
    t = torch.randint(T, (size,))
    noise = Batch(z0, cond, t, z0, t).to(base.device)
    for _ in range(3):  # the first ones are slower
        begin = time.perf_counter()
        state.optimizer.zero_grad()
        loss = gradients(loss_of, noise, options.accumulate)
        state.update(0.0, lr=0.0)
        loss.item()  # a GPU is waited for
        seconds = time.perf_counter() - begin
    minutes = options.steps * seconds / 60
    say(f"expected   {seconds:.2g} s a step, {minutes:.2g} minutes for all of them; "
        f"{memory_text(base.device)}")


def conclude(options: Options, device: torch.device, out: Path) -> None:
    """Say where the pictures are, and what to do with the run."""
    say(f"memory     {memory_text(device)}")
    say(f"pictures   {out / 'index.html'}, {out / 'filmstrip.png'} and {out / 'samples'}")
    say(f"next       python -m tinyanl.sample --run {out} --like {options.data} "
        "--mask-rate 0.3 --n 16")


def memory_text(device: torch.device) -> str:
    """The most memory held so far, in words."""
    megabytes = peak_megabytes(device)
    return "memory not known here" if megabytes is None else f"{megabytes:,.0f} MB at most"


def begin(state: State, earlier: dict | None, examples: Examples, options: Options,
          out: Path) -> None:
    """Go on from an earlier state, or clear the folder and paint what the untouched base makes of
    the examples; leave config.json and a first state."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if earlier:
        state.load_state_dict(earlier)
        earlier.clear()  # the copies of its tensors in host memory are not needed any more
        nothing = ": nothing is left to do" if state.step >= options.steps else ""
        say(f"resumed    at step {state.step}, {options.steps} were asked for{nothing}")
    elif is_first_process():
        remove_stale(out)
        draw(state, examples, options.seed, out)
    save(json.dumps(options.config(), indent=1) + "\n", out / "config.json")
    keep(options, state, out)


def keep(options: Options, state: State, out: Path, bar: tqdm | None = None) -> None:
    """Save, and write index.html, the page to watch the run on."""
    if not is_first_process():
        return
    state.save(out)
    seconds_left = None
    if bar is not None and state.step > bar.initial:
        pace = bar.format_dict["elapsed"] / (state.step - bar.initial)
        seconds_left = pace * (options.steps - state.step)
    data = shlex.quote(str(options.data))
    run = shlex.quote(str(out))
    commands = {
        "Draw more, like given pictures:": f"python -m tinyanl.sample --run {run} --like {data}",
        "Draw from words:": f'python -m tinyanl.sample --run {run} --text "a red rose"',
        "Go on, should it have stopped:": resume_command(options)}
    grid = f"samples/step_{max(state.frames, default=0):06d}.png"
    content = page(f"tinyanl: {out.name}", state.step, options.steps, seconds_left, grid,
                   state.log, options.config(), commands)
    save(content, out / "index.html")


def resume_command(options: Options) -> str:
    """The command line that goes on with a run: every flag that is not at its default."""
    words = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in ("resume", "overwrite") or value == field.default:
            continue
        words.append("--" + field.name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return shlex.join(["python", "-m", "tinyanl.train", *words, "--resume"])


def loss_function(options: Options, run: Run, world: int) -> Callable[..., Tensor]:
    """(z0, cond, t, eps) -> loss, with what --checkpoint, --compile and torchrun ask for."""
    unet_of(run.base, run.model).checkpointing = options.checkpoint
    loss_of = Loss(run)
    if world > 1:
        has_idle = len(with_effect(run.model, options.tokens)) < len(trained(run.model))
        loss_of = DistributedDataParallel(loss_of, find_unused_parameters=has_idle)
        if options.compile and options.checkpoint:  # torch before 2.13 cannot split such a graph
            torch._dynamo.config.optimize_ddp = False
    return torch.compile(loss_of) if options.compile else loss_of


def progress(options: Options, state: State, rank: int) -> tqdm:
    """The progress bar over the steps that are left."""
    return tqdm(range(state.step, options.steps), "training", initial=state.step,
                total=options.steps, unit="img", unit_scale=options.batch, disable=rank > 0)


def read_numbers(loss: Tensor, norm: Tensor, stop: int, world: int) -> tuple[float, float, bool]:
    """Mean loss over the processes, gradient norm, and whether any of them is told to stop, so that
    all stop: the one read of a step for which a GPU is waited."""
    sums = torch.stack([loss, torch.full_like(loss, stop)])
    if world > 1:
        torch.distributed.all_reduce(sums)
    loss, stop, norm = torch.stack([sums[0] / world, sums[1], norm]).tolist()
    return loss, norm, stop > 0


def cosine(highest: float, step: int, steps: int) -> float:
    """The learning rate of a step: a half cosine from the highest at step 0 down to 0 at `steps`.
    A finished run that is resumed with more steps goes on along the longer cosine."""
    return highest * (1 + math.cos(math.pi * step / steps)) / 2


def not_finite(
    step: int, loss: float, norm: float, lr: float, data: TrainingData, batch: Batch
) -> str:
    """What to say of a loss or gradient that is no number."""
    names = sorted({data.names[i] for i in batch.pictures.tolist()})
    return (f"step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate {lr:g}. The "
            "state before it is kept. The same weights would meet the same batch again: --resume "
            "with another --batch draws other pictures; if that fails, too, --overwrite with a "
            "smaller --lr. Pictures: " + ", ".join(names))


def log(state: State, curves: dict[str, Batch], watch: Callable[[Run], dict[str, float]] | None,
        bar: tqdm, out: Path, rank: int, world: int) -> None:
    """Add a line to log.jsonl: the mean training loss since the last one, the averaged model's loss
    on fixed batches of training and held-out pictures, shared among the processes, and what else
    train() was asked to watch."""
    losses = torch.stack([curve_loss(state.average, batch, rank, world)
                          for batch in curves.values()])
    if world > 1:
        torch.distributed.all_reduce(losses)
    row = {"step": state.step, "loss": sum(state.losses) / len(state.losses)}
    row |= dict(zip(curves, losses.tolist(), strict=True))
    row |= watch(state.average) if watch else {}
    state.log.append(row)
    state.losses = []
    save("".join(json.dumps(row) + "\n" for row in state.log), out / "log.jsonl")
    bar.set_postfix(loss=f"{row['loss']:.4f}", held_out=f"{row['held_out']:.4f}")


def main(argv: list[str] | None = None) -> None:
    parser = add_options(command("train", __doc__), Options)
    args = parser.parse_args(argv)
    with mistakes_in_one_line(parser, stopped="stopped; --resume goes on from what was saved"):
        train(**vars(args))


if __name__ == "__main__":
    main()
