"""Transfer a pretrained latent diffusion model to a folder of pictures, by training ANL modules or what --tune says.

    python -m tinyanl.flowers ./flowers && python -m tinyanl.train --data ./flowers
    python -m tinyanl.train --data ./birds --weights weights/imagenet256 --steps 4000
    torchrun --nproc-per-node 4 -m tinyanl.train --data ./birds --weights weights/imagenet256     each a part of a batch

The first stage and CLIP stay frozen, and with ANL the U-Net too. Pictures are encoded once, with their mirror images; a
tenth of them is held out. Training then draws (latent, embedding) pairs from memory and minimises
|eps - eps_hat(z_t, t, cond)|^2, DDPM eq. (14). Half of the conditions are partly masked (--train-mask): our addition,
the paper masks at sampling only. Diversity then costs less fidelity, words lose some (tutorials/08_masks.ipynb).
B batch, N pictures, C h w latent, D CLIP embedding width.
"""
import copy
import json
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from .data import describe, file_identity, open_rgb, scan, to_square
from .encode import IN_MEMORY, NEUTRAL, embed_texts, encode
from .loss import COND_DROP, Loss, denoising_loss, gradients, held_out_batch, rehearse, training_batch
from .models import Run, generator, load_base, split
from .runs import (claim, command, earlier_state, join_processes, mistakes_in_one_line, noting_signals, peak_megabytes,
                   save)
from .sample import filmstrip, sample, to_uint8
from .tune import DEAD, TUNES, trained, tunable

SWEPT = "by a sweep on drawn flowers: tutorials/results.json"  # 250 steps at 1e-4 ... 1e-2, lowest held-out loss
LEARNING_RATES = {"anl": 2e-3, "attention": 1e-3, "all": 3e-4, "scratch": 1e-3, "deep": 1e-3, "shallow": 1e-3,
                  "uncond": 1e-3}  # anl: 1e-3 gave .0887, 3e-3 .0874, 1e-2 .0906, a parabola's least is at 2.4e-3
UNMEASURED = 1e-4, "base_learning_rate of LDM's cin256-v2; no rate was measured here"
EMA_DECAY = 0.995  # of the weights that are saved and sampled; at first (1 + step) / (10 + step)
ROWS = 8  # pictures in every sample grid, rows of the filmstrip
LOG_EVERY = 20  # steps


def draw(run: Run, cond: Tensor, likes: Tensor, frames: dict[int, Tensor], step: int, seed: int, out: Path) -> None:
    """Add this step's samples to `frames`, and write their grid, under the pictures they are like, and the filmstrip of
    Figure 1: a row per seed and held-out condition, a column per checkpoint.  likes and frames (R 3 S S) uint8."""
    frames[step] = to_uint8(sample(run, cond, seed=seed))
    grid = make_grid(torch.cat([likes, frames[step]]), nrow=len(likes), pad_value=255)
    save(to_pil_image(grid), out / "samples" / f"step_{step:06d}.png")
    save(filmstrip({"like": likes, **{f"{step}": x for step, x in frames.items()}}), out / "filmstrip.png")


def train(data: str | Path, weights: str | Path | None = None, tune: str = "anl", steps: int = 1000, batch: int = 32,
          lr: float | None = None, tokens: int = 1, ratio: int = 4, train_mask: float = 0.5,
          out: str | Path | None = None, resume: bool = False, overwrite: bool = False,
          sample_every: int | None = None, save_every: int | None = None, seed: int = 0, device: str | None = None,
          compile: bool = False, uncentred: bool = False, dry_run: bool = False, accumulate: int = 1,
          checkpoint: bool = False) -> Path:
    """Train and return the run folder (`--help` explains the arguments). It holds config.json, adapter.pt (what was
    trained, averaged: for sampling), state.pt (for resuming), log.jsonl, samples/ and filmstrip.png.

    Raises ValueError or OSError, in one sentence that says what to mend, before anything slow starts where it can, and
    KeyboardInterrupt after Ctrl-C or SIGTERM, when it has saved."""
    if tune not in TUNES or resume and overwrite:
        raise ValueError(f"tune={tune!r} must be one of {', '.join(TUNES)}; resume or overwrite, not both")
    whole = dict(steps=steps, batch=batch, tokens=tokens, ratio=ratio, sample_every=sample_every, save_every=save_every,
                 accumulate=accumulate)
    if wrong := [f"{name}={n}" for name, n in whole.items() if n is not None and n < 1]:
        raise ValueError(f"{', '.join(wrong)}: at least 1")
    if not 0 <= train_mask <= 1 - COND_DROP or lr is not None and not 0 < lr < 1 or not 0 <= seed < 2**32:
        raise ValueError(f"train_mask={train_mask} must be between 0 and {1 - COND_DROP}, lr={lr} between 0 and 1, "
                         f"seed={seed} between 0 and {2**32 - 1}")
    rank, world = join_processes()
    if batch % (parts := world * accumulate):
        raise ValueError(f"batch={batch} does not split into {parts} equal parts, {accumulate} for each of {world} "
                         "processes: choose another")
    if not Path(data).exists():
        raise FileNotFoundError(f"{data} does not exist: name a folder of pictures, or draw one (tinyanl.flowers)")
    out = Path(out or Path("runs") / Path(data).resolve().name)
    lr, lr_source = (lr, "given") if lr else UNMEASURED if weights else (LEARNING_RATES[tune], SWEPT)
    config = {"data": str(data), "weights": weights and str(weights), "tune": tune, "batch": batch, "lr": lr,
              "tokens": tokens, "ratio": ratio, "train_mask": train_mask, "seed": seed, "uncentred": uncentred}
    lock = None if dry_run or rank else claim(out)  # until this function is left
    state = earlier_state(out, config, resume, overwrite)
    if world > 1:
        torch.distributed.barrier()  # all have looked, before the first of them writes

    # The frozen base, the pictures, what is trained
    base = load_base(weights, device)
    folder = scan(data, base.size)
    train_ids, held_ids = split([picture.path for picture in folder.pictures], seed)
    torch.manual_seed(seed)
    model = tunable(base, tune, tokens, ratio).to(base.device)
    changing = [p for name, p in trained(model).items() if tokens > 1 or not DEAD.search(name)]
    unet = model["unet"] if "unet" in model else base.unet
    unet.checkpointing = checkpoint
    trainable, total = (sum(p.numel() for p in own) for own in (trained(model).values(),
                                                                {*model.parameters(), *unet.parameters()}))
    dead = trainable - sum(p.numel() for p in changing)
    print(f"data       {describe(folder)}; {len(held_ids)} held out\n"
          f"base       {base.name}\n"
          f"sizes      {base.size} px pictures, latents {base.latent_shape}, condition of {base.clip.dim} numbers\n"
          f"device     {base.device}, {'bf16 autocast' if base.bf16 else 'float32'}\n"
          f"trainable  {trainable:,} parameters ({tune}), {trainable / total:.0%} of the total {total:,}"
          + f"; {dead:,} of them have no effect at one condition token" * bool(dead) + "\n"
          f"training   {steps} steps, effective batch {batch}" + f" in {parts} parts" * (parts > 1)
          + f", learning rate {lr:g} ({lr_source})", flush=True)
    for path, reason in folder.skipped[5:]:  # the line above names the first five
        print(f"skipped    {str(path)!r}: {reason}")
    for note in folder.notes:
        print(f"note       {note}")
    if dry_run:
        mu = torch.zeros(base.clip.dim)
        seconds = rehearse(Run(base, model, mu, mu, 1.0, config, []), changing, batch // world, accumulate)
        print(f"expected   {seconds:.2g} s a step, {steps * seconds / 60:.2g} minutes for all of them; "
              f"{peak_megabytes(base.device) or math.nan:,.0f} MB at most")
        return out

    # Everything frozen that depends on a picture alone is computed here, once
    paths = [picture.path for picture in folder.pictures]
    latents, embeddings = encode(base, paths, cache=out / "cache")  # N 2 C h w, N 2 D
    mu = embeddings[train_ids].mean((0, 1)) * (not uncentred)
    captions = [folder.pictures[i].text for i in train_ids.tolist() if folder.pictures[i].text]
    statistics = {"mu": mu, "sigma": (embeddings[train_ids] - mu).square().mean().sqrt().item(),
                  "mu_text": embed_texts(base, captions or list(NEUTRAL), cut=True).mean(0) * (not uncentred)}
    if not statistics["sigma"] > 1e-6:
        raise ValueError(f"CLIP sees no difference between the pictures of {data}: give different ones")
    pictures = [str(picture.path.relative_to(data)) for picture in folder.pictures]
    files = [file_identity(path) for path in paths]
    adapter = {"config": config, "fingerprints": base.fingerprints(), "pictures": pictures, "files": files,
               **statistics}
    same = {"weights": adapter["fingerprints"], "pictures": pictures}
    if state and (other := [name for name, now in same.items() if state["same"][name] != now]):
        raise ValueError(f"{out} was trained on other {' and '.join(other)} than there are now: put them back, or give "
                         "--out for a new run")
    live, ema = (Run(base, own, config=config, pictures=pictures, files=files, **statistics)
                 for own in (model, copy.deepcopy(model)))
    tensors, averaged = ({name: p.data for name, p in trained(run.model).items()} for run in (live, ema))
    ema.model.requires_grad_(False)
    cond = live.condition(embeddings)  # N 2 D
    latents = latents if latents.nbytes > IN_MEMORY else latents.to(base.device)  # what lies in files stays there
    used = {"training": train_ids, "held_out": held_ids}
    fixed = {name: held_out_batch(latents, cond, ids) for name, ids in used.items()}
    shown = held_ids[torch.arange(ROWS) % len(held_ids)]
    likes = to_uint8(torch.stack([to_square(open_rgb(folder.pictures[i].path), base.size) for i in shown]))  # R 3 S S

    optimizer = torch.optim.AdamW(changing, lr=lr)
    start, frames, log, losses = 0, {}, [], []

    def keep(step: int) -> None:
        """Leave a state after `step` steps; state.pt is what counts, adapter.pt follows from it."""
        save({"step": step, "live": tensors, "ema": averaged, "optimizer": optimizer.state_dict(), "frames": frames,
              "log": log, "losses": losses, "same": same, "config": config}, out / "state.pt")
        save({"step": step, "trained": averaged, **adapter}, out / "adapter.pt")

    (out / "samples").mkdir(exist_ok=True)
    if state:
        for name in tensors:
            tensors[name].copy_(state["live"][name])
            averaged[name].copy_(state["ema"][name])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = lr
        start, frames, log, losses = (state[name] for name in ("step", "frames", "log", "losses"))
        print(f"resumed    at step {start}" + f", {steps} were asked for: nothing is left to do" * (start >= steps))
    else:
        for name in ("adapter.pt", "state.pt", "log.jsonl", "evaluation.json", "samples/step_*.png"):  # is replaced
            for stale in () if rank else out.glob(name):
                stale.unlink()
        draw(ema, cond[shown, 0], likes, frames, 0, seed, out)
    save(json.dumps(config, indent=1) + "\n", out / "config.json")
    keep(start)

    shared = Loss(live) if world == 1 else DistributedDataParallel(Loss(live), find_unused_parameters=dead > 0)
    loss_of = torch.compile(shared) if compile else shared
    sample_every = sample_every or max(1, steps // 8)
    save_every = save_every or sample_every
    bar = tqdm(range(start, steps), "training", initial=start, total=steps, unit="img", unit_scale=batch,
               disable=rank > 0)
    with noting_signals() as noted:
        for step in bar:
            drawn = training_batch(latents, cond, train_ids, batch, train_mask, seed, step)
            optimizer.zero_grad()
            loss = gradients(loss_of, drawn, accumulate, rank, world)
            sums = torch.stack([loss, torch.full_like(loss, len(noted))])  # when one is told to stop, all stop
            if world > 1:
                torch.distributed.all_reduce(sums)
            loss, stop = sums[0] / world, bool(sums[1])
            norm = torch.nn.utils.clip_grad_norm_(changing, 1.0)
            if not (loss + norm).isfinite():  # before it reaches the weights
                keep(step)
                i = torch.randint(2 * len(train_ids), (batch,), generator=generator(seed, step))  # as in training_batch
                files = sorted({pictures[train_ids[k // 2]] for k in i.tolist()})
                raise ValueError(f"step {step}: loss {loss:g}, gradient norm {norm:g}, learning rate {lr:g}. The state "
                                 f"before it is kept: --resume with a smaller --lr. Pictures: {', '.join(files)}")
            optimizer.step()
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            for mean, x in zip(averaged.values(), tensors.values()):
                mean.lerp_(x, 1 - decay)
            losses.append(loss.item())

            done = step + 1
            if done % LOG_EVERY == 0 or done == steps:
                log.append({"step": done, "loss": sum(losses) / len(losses),
                            **{name: denoising_loss(ema, *own).item() for name, own in fixed.items()}})
                losses = []
                save("".join(json.dumps(row) + "\n" for row in log), out / "log.jsonl")
                bar.set_postfix(loss=f"{log[-1]['loss']:.4f}", held_out=f"{log[-1]['held_out']:.4f}")
            if done % sample_every == 0 or done == steps:
                draw(ema, cond[shown, 0], likes, frames, done, seed, out)
            if done % save_every == 0 or done == steps or stop:
                keep(done)
            if stop and done < steps:
                raise KeyboardInterrupt(f"stopped and saved at step {done}: the same command with --resume goes on")
    print(f"memory     {peak_megabytes(base.device) or math.nan:,.0f} MB at most\n"
          f"pictures   {out / 'filmstrip.png'} and {out / 'samples'}\n"
          f"next       python -m tinyanl.sample --run {out} --like {data} --mask-rate 0.3 --n 16")
    if world > 1:
        torch.distributed.destroy_process_group()
    return out


def main(argv: list[str] | None = None) -> None:
    p = command("train", __doc__)
    p.add_argument("--data", type=Path, required=True, help="folder of pictures, any nesting, or with metadata.jsonl")
    p.add_argument("--weights", type=Path, help="folder of released weights (default: the embedded emoji64)")
    p.add_argument("--tune", default="anl", choices=TUNES, help="what is trained: tune.TUNES (default %(default)s)")
    p.add_argument("--steps", type=int, default=1000, help="optimizer steps (default %(default)s)")
    p.add_argument("--batch", type=int, default=32, help="pictures a step (default %(default)s)")
    p.add_argument("--accumulate", type=int, default=1, help="parts that a batch is computed in, to need less memory")
    p.add_argument("--checkpoint", action="store_true", help="keep few activations and compute them twice: less memory")
    p.add_argument("--lr", type=float, help="constant learning rate (default: as measured, printed at the start)")
    p.add_argument("--tokens", type=int, default=1, help="condition tokens K (default %(default)s)")
    p.add_argument("--ratio", type=int, default=4, help="relative width of the mapping (default %(default)s)")
    p.add_argument("--train-mask", type=float, default=0.5, help="share that is partly masked (default %(default)s)")
    p.add_argument("--out", type=Path, help="run folder (default: runs/ and the name of the data folder)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="continue the run in --out; at 0 where there is none")
    existing.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    p.add_argument("--sample-every", type=int, help="steps between sample grids (default: an eighth of the steps)")
    p.add_argument("--save-every", type=int, help="steps between saves (default: as --sample-every)")
    p.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    p.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    p.add_argument("--compile", action="store_true", help="torch.compile the training step")
    p.add_argument("--uncentred", action="store_true", help="do not subtract the mean embedding, to compare")
    p.add_argument("--dry-run", action="store_true", help="say everything, time three steps, write nothing")
    args = p.parse_args(argv)
    with mistakes_in_one_line(p, stopped="stopped; --resume goes on from what was saved"):
        train(**vars(args))


if __name__ == "__main__":
    main()
