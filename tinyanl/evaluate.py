"""Measure a trained run against real pictures, at several mask rates.

    python -m tinyanl.flowers ./fresh --n 1024 --seed 1
    python -m tinyanl.evaluate --run runs/flowers --real ./fresh --rates 0 0.3 0.7

Conditions come from the training pictures, which invite copies, and from those held out, 16 samples
each. Two more rows say what the figures are worth. "reconstructions": real pictures encoded and
decoded by the first stage, without any diffusion; nothing that is painted through it can be
expected to pass them. "real": the floor, real pictures against other real ones.

FD_clip is judged by the CLIP that conditioned the samples, which flatters them. The kind and the
colour of drawn flowers are judged by a network that shares nothing with the model (`Judge`),
trained on 6,000 other flowers. N samples, S picture side, D features.
"""
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .data import Picture, file_identity, scan
from .encode import embed_pictures, embed_texts, encode
from .experiments.judge import (
    CLASSES,
    Network,
    class_of,
    judged,
    pictures,
    right_answers,
    share,
    train_judge,
)
from .identify import inspect
from .metrics import (
    diversity,
    frechet_distance,
    inception,
    inception_score,
    nearest_similarity,
    precision_recall,
    retrieval,
)
from .models import Base, Run, RunPictures, generator, load_run, training_set
from .options import add_options, option
from .runs import command, mistakes_in_one_line, save
from .sample import GUIDANCE, STEPS, SamplingOptions, sample, to_uint8
from .table import table

EACH = 16  # samples of a condition


@dataclass(frozen=True)
class Observers:
    """The networks that look at pictures: the run's CLIP; the judge of flowers and FID's Inception
    where there are such."""

    base: Base
    judge: Network | None = None
    inception: Network | None = None

    def observe(self, x: Tensor) -> dict[str, Tensor]:
        """Pictures (N 3 S S) uint8 -> "clip", unit embeddings (N D); "judge", the logits of the
        judge (N 43); "inception" (N 2048) and "inception's logits" (N 1008)."""
        seen = {"clip": embed_pictures(self.base, x)}
        if self.judge:
            seen["judge"] = judged(self.judge, x)[1]
        if self.inception:
            features, logits = judged(self.inception, x, device=self.base.device)
            seen["inception"] = features
            seen["inception's logits"] = logits
        return seen


def measure(samples: dict[str, Tensor], real: dict[str, Tensor], training: Tensor,
            classes: Tensor | None = None) -> dict:
    """Figures of N samples, EACH in a row of one condition, against as many real pictures; both as
    Observers see them.

    training (M D): unit CLIP embeddings of what the run has seen. classes (N,): what the samples
    should show, for the judge. FD: Frechet distance, times 1000 where on CLIP. within, across:
    diversity of samples of one condition, and of different ones.
    """
    clip = samples["clip"]
    n = len(clip)
    row = {"samples": n, "real": len(real["clip"])}
    row["1000 FD_clip"] = 1000 * frechet_distance(clip, real["clip"])
    row["precision"], row["recall"] = precision_recall(real["clip"], clip)
    groups = clip.unflatten(0, (-1, EACH))  # N/16 16 D
    row["within"] = sum(diversity(group) for group in groups) / len(groups)
    row["across"] = sum(diversity(groups[:, j]) for j in range(EACH)) / EACH
    row["nearest training picture"] = nearest_similarity(clip, training).mean().item()
    if "judge" in samples and classes is not None:
        row |= right_answers(samples["judge"], classes)
    if "inception" in samples:
        row["FID"] = frechet_distance(samples["inception"], real["inception"])
        order = torch.randperm(n, generator=generator(0, 0))
        shuffled = samples["inception's logits"][order]
        row["IS"], row["IS deviation"] = inception_score(shuffled)
    return row


@torch.no_grad()
def reconstruct(base: Base, x: Tensor, batch: int = 32) -> Tensor:
    """Pictures (N 3 S S) uint8, encoded and decoded by the first stage -> (N 3 S S) uint8."""
    again = []
    for part in x.split(batch):
        z = base.autoencoder.encode((part / 127.5 - 1).to(base.device))  # B C h w
        again.append(to_uint8(base.autoencoder.decode(z).clamp(-1, 1).cpu()))
    return torch.cat(again)


def classes_of(found: list[Picture]) -> Tensor | None:
    """The classes that captions of drawn flowers tell (N,); None if one of them tells none."""
    classes = [class_of(picture.text) for picture in found]
    return None if None in classes else torch.tensor(classes)


@dataclass(frozen=True)
class Plan:
    """What is sampled for a row each: `n` pictures in `steps` DDIM steps with `guidance`, for each
    set of conditions and each mask rate."""

    rates: tuple[float, ...] = (0.0,)
    n: int = 512
    steps: int = STEPS
    seed: int = 0
    sets: tuple[str, ...] = ("training", "held out")
    guidance: float = GUIDANCE

    def __post_init__(self):
        if self.n % EACH or self.n < 2 * EACH:
            raise ValueError(f"--n {self.n} must be a multiple of {EACH}, at least {2 * EACH}")
        if not all(0 <= rate <= 1 for rate in self.rates):
            raise ValueError(f"--rates {' '.join(map(str, self.rates))} must be between 0 and 1")


def evaluate(run: Run, real: Tensor, plan: Plan, judge: Network | None = None,
             network: Network | None = None, classes: Tensor | None = None,
             seen: RunPictures | None = None) -> list[dict]:
    """The rows of figures, as `rows_of_figures` yields them.

    real (M 3 S S) uint8: pictures that the run has not seen, 2 n of them for the last two rows to
    have as many samples; classes (M,): what they show, for the judge. network: FID's Inception.
    seen: the run's own pictures, if they are not where its config says. ValueError: too few real
    pictures.
    """
    observers = Observers(run.base, judge, network)
    return list(rows_of_figures(run, real, plan, observers, classes, seen))


def rows_of_figures(run: Run, real: Tensor, plan: Plan, observers: Observers,
                    classes: Tensor | None = None,
                    seen: RunPictures | None = None) -> Iterator[dict]:
    """A row for each set of conditions and mask rate as soon as it is finished; then those of
    reconstructions and of real pictures, if at least 2 EACH of these are left."""
    n = plan.n
    if len(real) < n:
        raise ValueError(f"{n} samples against {len(real)} real pictures: give as many")
    seen = seen or training_set(run)
    paths = [picture.path for picture in seen.pictures]
    _, embeddings = encode(run.base, paths, latents=False)  # P 2 D
    training = embeddings[seen.train_ids].flatten(0, 1)
    reference = observers.observe(real[:n])

    for name in plan.sets:
        ids = seen.train_ids if name == "training" else seen.held_ids
        for rate in plan.rates:
            x, shown = samples_like(run, seen.pictures, embeddings, ids, rate, plan)
            figures = measure(observers.observe(x), reference, training, shown)
            how = {"rate": rate, "guidance": plan.guidance, "steps": plan.steps}
            yield {"conditions": name, **how, **figures}

    left = min(n, (len(real) - n) // EACH * EACH)
    if left < 2 * EACH:
        return
    others = real[n : n + left]
    shown = None if classes is None else classes[n : n + left]
    for name, x in (("reconstructions", reconstruct(run.base, others)), ("real", others)):
        yield {"conditions": name, **measure(observers.observe(x), reference, training, shown)}


def samples_like(run: Run, found: list[Picture], embeddings: Tensor, ids: Tensor, rate: float,
                 plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Samples (N 3 S S) uint8, EACH of a condition, from the embeddings (P 2 D) of the pictures
    `ids`, and what they should show by their captions (N,)."""
    told, of = spread_conditions(embeddings, ids, plan.n)
    cond = run.condition(told)
    how = {"guidance": plan.guidance, "steps": plan.steps, "seed": plan.seed}
    x = sample(run, cond, rate, **how)
    return to_uint8(x), classes_of([found[i] for i in of.tolist()])


def spread_conditions(embeddings: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The conditions of n samples, EACH of one in a row: embeddings (n D) from those (P 2 D) of the
    pictures `ids` and of their mirror images, and the pictures that they are of (n,)."""
    conditions = embeddings[ids].transpose(0, 1).flatten(0, 1)  # all of them, then all mirrored
    stride = max(1, len(ids) * EACH // n)  # so that they are spread over all
    i = torch.arange(n // EACH) * stride % len(conditions)
    i = i.repeat_interleave(EACH)  # n
    return conditions[i], ids[i % len(ids)]


def text_figures(run: Run, real: list[Picture], judge: Network, each: int = 12,
                 steps: int = STEPS, guidance: float = GUIDANCE) -> dict:
    """R-precision: the share of samples from "a red rose" ... whose best caption of all 43 is their
    prompt's, by CLIP and by the judge; and of real flowers (pictures with captions, as from
    `scan`)."""
    captions = embed_texts(run.base, [f"a {name}" for name in CLASSES])  # 43 D
    prompts = torch.arange(len(CLASSES)).repeat_interleave(each)
    cond = run.condition(captions, text=True)[prompts]
    x = to_uint8(sample(run, cond, guidance=guidance, steps=steps))
    figures = {"samples": len(x), "guidance": guidance, "chance": 1 / len(CLASSES)}
    flowers = pictures([picture.path for picture in real], run.base.size)
    truth = torch.tensor([class_of(picture.text) for picture in real])
    for name, shown, right in (("samples", x, prompts), ("real", flowers, truth)):
        embeddings = embed_pictures(run.base, shown)
        figures[f"R-precision of {name} by CLIP"] = retrieval(embeddings, captions, right)
        logits = judged(judge, shown)[1]
        figures[f"R-precision of {name} by the judge"] = share(logits, right)
    return figures


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """The flags of `python -m tinyanl.evaluate`."""

    run: Path = option(help="folder that tinyanl.train wrote")
    real: Path = option(help="pictures it has not seen; twice --n for the last two rows")
    rates: tuple[float, ...] = option((0.0,), help="mask rates")
    n: int = option(512, help="samples a row")
    inception: Path | None = option(None, help="released FID weights: adds FID and Inception Score")
    trained_on: Path | None = option(None, help="the folder it was trained on, if that has moved")

    def plan(self) -> Plan:
        """What they ask to be sampled."""
        return Plan(tuple(self.rates), self.n, self.steps, self.seed, guidance=self.guidance)


def load_inception(path: Path, device: torch.device) -> Network:
    """FID's Inception on a device. ValueError: the file is something else."""
    kind, state = inspect(path)
    if "inception" not in kind.parts:
        raise ValueError(f"{path} is {kind.name}, not FID's Inception: python -m tinyanl.weights")
    with device:  # where its tensors are made
        return inception(state)


def real_pictures(options: Options, size: int) -> list[Picture]:
    """2 n of the pictures of --real, or as many as there are, in a random order: they are listed
    class by class. ValueError: fewer than n."""
    folder = scan(options.real, size)
    for note in folder.notes:
        print(f"note: {note}")
    found = folder.pictures
    if len(found) < options.n:
        raise ValueError(f"{options.real} has {len(found)} pictures, --n {options.n} needs as "
                         "many: give more, or a smaller --n")
    order = torch.randperm(len(found), generator=generator(0, 0))
    return [found[i] for i in order[: 2 * options.n]]


def warn_of_seen(real: list[Picture], seen: RunPictures) -> None:
    """Say how many of the real pictures are among those that the run was trained on."""
    training = {file_identity(seen.pictures[i].path) for i in seen.train_ids}
    among = sum(file_identity(picture.path) in training for picture in real)
    if among:
        print(f"warning    {among} of the {len(real)} real pictures are training pictures of this "
              "run: copies of them will look good")


def run_command(options: Options) -> None:
    """Evaluate as the flags ask; evaluation.json gets each row as soon as it is finished."""
    plan = options.plan()
    options.check()
    run = load_run(options.run, options.weights, options.device)
    seen = training_set(run, options.trained_on)
    found = real_pictures(options, run.base.size)
    warn_of_seen(found, seen)
    network = None
    if options.inception:
        network = load_inception(options.inception, run.base.device)
    judge = accuracy = None
    if class_of(found[0].text) is not None:
        judge, accuracy = train_judge(options.run.parent / "judge")
    real = pictures([picture.path for picture in found], run.base.size)

    out = options.run / "evaluation.json"
    rows = []
    try:
        observers = Observers(run.base, judge, network)
        for row in rows_of_figures(run, real, plan, observers, classes_of(found), seen):
            rows.append(row)
            save(json.dumps({"judge's accuracy": accuracy, "rows": rows}, indent=1), out)
    except KeyboardInterrupt as stop:
        kept = f"rows finished: {len(rows)}, in {out}" if rows else "no row was finished"
        raise KeyboardInterrupt(f"stopped: {kept}") from stop
    print(table(rows))
    if judge:
        print(f"\nThe judge knows {accuracy:.1%} of real flowers.")


def main(argv: list[str] | None = None) -> None:
    parser = add_options(command("evaluate", __doc__), Options)
    options = Options(**vars(parser.parse_args(argv)))
    with mistakes_in_one_line(parser):
        run_command(options)


if __name__ == "__main__":
    main()
