"""Train and measure everything that is compared: the paper's claims, on the small models, by one command.

    python -m tinyanl.pretrain families --data ./emoji --out ./suite      faces and vehicles; flowers are drawn
    python -m tinyanl.experiments.suite ./suite                                       hours: goes on where it stopped

./suite/results.json gets a row for every way to tune, set and seed, at several steps (64-px flowers, faces, vehicles in
place of the paper's sets; seconds are those since the row before); a sweep of learning rates; ablations; the mask
curve; text; semi-supervised learning. ./suite/*.png are Figure 1's filmstrips, a row for each way to tune. What is
in results.json is not computed again: to repeat a row, delete it there and its folder in ./suite/runs. C checkpoints.
"""
import functools
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from ..data import Picture, open_rgb, scan, to_square
from ..evaluate import EACH, Plan, classes_of, evaluate, text_figures
from ..flowers import write
from .judge import pictures, train_judge
from ..models import load_run, training_set
from ..options import add_options
from ..runs import command, load, mistakes_in_one_line, save
from ..sample import SamplingOptions, filmstrip, to_uint8
from .semi_supervised import compare, draw_sets
from ..tune import TUNES

MASK_RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
STEPS = (60, 125, 250, 500) + (1000, 2000, 4000) * torch.cuda.is_available()
RATES, SWEEP_STEPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), 250
SETS = "flowers", "faces", "vehicles"
FIRST = {"data": SETS[0], "tune": "anl", "seed": 0}


def cells() -> Iterator[tuple[dict, tuple[int, ...]]]:
    """What is trained, arguments of train, and the steps at which it is measured; what decides the defaults early."""
    yield from (({**FIRST, "tune": tune}, STEPS) for tune in TUNES)
    for change in ({"tokens": 2}, {"tokens": 4}, {"tokens": 8}, {"tokens": 8, "lr": 1e-3},  # K = 8 diverged at 3e-3
                   {"ratio": 1}, {"ratio": 2}, {"train_mask": 0.25}, {"train_mask": 0.5}, {"uncentred": True},
                   *({"seed": seed, "train_mask": share} for seed in (1, 2) for share in (0.25, 0.5))):
        yield {**FIRST, **change}, STEPS[-1:]
    for seed in (1, 2):
        yield from (({**FIRST, "tune": tune, "seed": seed}, STEPS) for tune in TUNES)
    for data in SETS[1:]:
        yield from (({**FIRST, "data": data, "tune": tune}, STEPS) for tune in TUNES)


def best_rate(loss_of: Callable[[float], float]) -> float:
    """The learning rate of RATES with the lowest loss, by walking downhill from the middle one."""
    i = len(RATES) // 2
    while True:
        losses = {j: loss_of(RATES[j]) for j in (i, i - 1, i + 1) if 0 <= j < len(RATES)}
        if (best := min(losses, key=losses.get)) == i:
            return RATES[i]
        i = best


def train_apart(data: Path, out: Path, steps: int, **arguments) -> dict:
    """tinyanl.train up to `steps`, in a process of its own -> the last line of its log, its seconds and peak MB."""
    words = [sys.executable, "-m", "tinyanl.train", "--data", data, "--out", out, "--resume", "--steps", steps,
             "--sample-every", steps]
    for name, value in arguments.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])] if value is not None else []
    begin = time.perf_counter()
    done = subprocess.run([str(word) for word in words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"training {out} failed, see above")
    log = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    if log["step"] != steps:
        raise ValueError(f"{out} is at step {log['step']} and cannot be measured at {steps}: delete that folder")
    return {"training loss": log["training"], "held-out loss": log["held_out"], "seconds": time.perf_counter() - begin,
            "peak MB": float(done.stdout.split("memory ")[1].split()[0].replace(",", ""))}


def strips(runs: dict[str, Path]) -> Image.Image:
    """Figure 1 for runs of one set: a row for each way to tune, the held-out picture and then the checkpoints."""
    columns = defaultdict(list)
    for folder in runs.values():
        run, frames = load_run(folder, device="cpu"), load(folder / "state.pt", {"frames"})["frames"]
        found, _, held = training_set(run)
        columns["like"].append(to_uint8(to_square(open_rgb(found[held[0]].path), run.base.size)))
        for step, x in frames.items():
            columns[f"{step}"].append(x[0])
    return filmstrip({label: torch.stack(column) for label, column in columns.items()}, list(runs))


def suite(folder: Path, n: int = 512, steps: int = 20, seed: int = 0, weights: Path | None = None,
          device: str | None = None) -> dict:
    """Make all that results.json lacks; it is written after every piece. n samples of `steps` DDIM steps a row."""
    out = folder / "results.json"
    base = {"weights": weights, "device": device, "train_mask": 0.0}  # none, as in the paper, where no cell asks for it
    results = json.loads(out.read_text()) if out.exists() else {}

    def piece(key: str, make: Callable[[], object]) -> object:
        if key not in results:
            results[key] = make()
            save(json.dumps(results, indent=1), out)
            print(f"{key}: {json.dumps(results[key])}", flush=True)
        return results[key]

    for name, count, number in (("flowers", 200, 0), ("fresh flowers", 1024, 1)):
        if not (folder / name / "metadata.jsonl").exists():
            write(folder / name, count, seed=number)
    for name in SETS:
        if not (folder / name / "metadata.jsonl").exists():
            raise FileNotFoundError(f"no {folder / name}: python -m tinyanl.pretrain families --data ./emoji --out "
                                    f"{folder}")
    judge, accuracy = train_judge(folder / "judge")
    cpu = Path("/proc/cpuinfo")  # only Linux tells the CPU's name
    names = [*re.findall(r"model name\s*: (.+)", cpu.read_text() if cpu.exists() else ""), platform.machine()]
    cores = f"{names[0]}, {torch.get_num_threads()} threads"
    machine = f"{torch.cuda.get_device_name() if torch.cuda.is_available() else cores}, torch {torch.__version__}"
    piece("setup", lambda: {"machine": machine, "samples": n, "DDIM steps": steps,
                            "weights": str(weights or "embedded"), "judge's accuracy": accuracy})

    def sweep(tune: str, lr: float) -> float:
        def make() -> dict:
            shutil.rmtree(folder / "sweep", ignore_errors=True)
            return train_apart(folder / "flowers", folder / "sweep", SWEEP_STEPS, tune=tune, lr=lr, seed=0, **base)

        return piece(f"sweep tune={tune} lr={lr:g}", make)["held-out loss"]

    @functools.cache  # read once for all rows
    def real(name: str, size: int) -> tuple[list[Picture], torch.Tensor]:
        found = scan(folder / name, size).pictures
        return found, pictures([p.path for p in found], size)

    def measured(cell: dict, run_folder: Path, done: int) -> dict:
        own = {**base, "lr": rates[cell["tune"]], **{name: value for name, value in cell.items() if name != "data"}}
        row = train_apart(folder / cell["data"], run_folder, done, **own)
        row["learning rate"] = own["lr"]
        run, flowers = load_run(run_folder, weights, device), cell["data"] == "flowers"
        row["trainable"] = sum(x.numel() for x in load(run_folder / "adapter.pt", {"trained"})["trained"].values())
        # of faces and vehicles there are no more than the run has seen
        _, x = real("fresh flowers" if flowers else cell["data"], run.base.size)
        x = x[: min(n, len(x) // EACH * EACH)]
        plan = Plan((0.0,), len(x), steps, seed, ("held out",))
        figures, = evaluate(run, x, plan, judge if flowers else None)
        return {**row, **figures, "real are": "fresh" if flowers else "the set itself", "machine": machine}

    def masks(run_folder: Path, sets: tuple[str, ...]) -> list[dict]:
        run = load_run(run_folder, weights, device)
        found, x = real("fresh flowers", run.base.size)
        return evaluate(run, x, Plan(MASK_RATES, n, steps, seed, sets), judge, classes=classes_of(found))

    def text(run_folder: Path) -> dict:
        run = load_run(run_folder, weights, device)
        return text_figures(run, real("fresh flowers", run.base.size)[0], judge, steps=steps)

    def learners() -> list[dict]:
        own = folder / "semi_supervised"
        draw_sets(own)
        train_apart(own / "unlabelled", own / "run", STEPS[-1], seed=0, lr=rates["anl"], **base)
        return compare(load_run(own / "run", weights, device), own)

    rates = {tune: best_rate(lambda lr: sweep(tune, lr)) for tune in TUNES}
    for cell, checkpoints in cells():
        name = " ".join(f"{key}={value}" for key, value in cell.items())
        run_folder = folder / "runs" / name.replace(" ", ",")
        for done in checkpoints:
            piece(f"{name} steps={done}", lambda: measured(cell, run_folder, done))
        if cell["tune"] == list(TUNES)[-1]:  # the last of a set
            runs = {tune: folder / "runs" / f"data={cell['data']},tune={tune},seed=0" for tune in TUNES}
            if not (strip := folder / f"{cell['data']}.png").exists():
                save(strips(runs), strip)
        change = {key: value for key, value in cell.items() if FIRST.get(key) != value}
        changed = "".join(f" {key}={value}" for key, value in change.items())
        if change.keys() <= {"train_mask", "uncentred", "seed"}:  # do masks need one of them, and how sure is that?
            piece("masks" + changed, lambda: masks(run_folder, ("held out",) if change else ("training", "held out")))
        if change.keys() <= {"train_mask", "seed"}:
            piece("text" + changed, lambda: text(run_folder))
        if "uncentred" in cell:  # what comes now repeats, or tells of other sets
            piece("semi-supervised", learners)
    return results


def main(argv: list[str] | None = None) -> None:
    p = command("experiments.suite", __doc__)
    p.add_argument("folder", type=Path, help="for everything that is made; it must hold faces and vehicles")
    p.add_argument("--n", type=int, default=512, help="samples a row (default %(default)s)")
    add_options(p, SamplingOptions)
    p.set_defaults(steps=20)
    args = p.parse_args(argv)
    with mistakes_in_one_line(p, "stopped: the same command keeps the finished rows and goes on"):
        SamplingOptions(steps=args.steps, seed=args.seed).check()
        if args.n % EACH or args.n < 2 * EACH:
            raise ValueError(f"--n {args.n} must be a multiple of {EACH}, at least {2 * EACH}")
        suite(args.folder, args.n, args.steps, args.seed, args.weights, args.device)
        print(args.folder / "results.json")


if __name__ == "__main__":
    main()
