"""Train and measure everything that is compared: the paper's claims, on the small models.

    python -m tinyanl.pretrain families --data ./emoji --out ./suite       faces and vehicles
    python -m tinyanl.experiments.suite ./suite                            hours

./suite/results.json gets a row for every way to tune, set and seed, at several steps (64-px
flowers, faces, vehicles in place of the paper's sets), each from a run of its own, since the
learning rate falls to 0 at a run's last step; a sweep of learning rates; ablations; the mask curve;
text; semi-supervised learning; long runs on few and many flowers, with their errors on the way, to
see them overfit. ./suite/*.png are Figure 1's filmstrips, a row for each way to tune.
Samples are compared with real pictures that no run has seen: other flowers, the half of the faces
and of the vehicles that is not trained on; and held against controls (controls.py), of as many
pictures.
With --report nothing is computed: results.md is written from the results.json that is there. With
--part only a part is, such as --part overfitting. The same command goes on where it stopped: what
is in results.json is not computed again. To repeat a row, delete it there and its folder in
./suite/runs. Rows name their weights and guidance: with
others, another folder is asked for.
"""
import contextlib
import functools
import io
import json
import multiprocessing
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..data import Picture, open_rgb, scan, to_square
from ..dataset import CURVE_SIZE, curve_batch
from ..encode import encode
from ..evaluate import EACH, Observers, Plan, classes_of, evaluate, text_figures
from ..flowers import save as save_set
from ..flowers import write
from ..loss import curve_loss
from ..models import Run, load_base, load_run, pick_device, to_condition, training_set
from ..options import add_options, option
from ..runs import claim, command, load, mistakes_in_one_line, peak_megabytes, save
from ..sample import SamplingOptions, filmstrip, to_uint8
from ..train import train
from ..tune import TUNES
from .controls import RealPictures, control_rows
from .judge import Network, pictures, train_judge
from .report import read_key, write_report
from .semi_supervised import compare, draw_sets

MASK_RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
STEPS = (60, 125, 250, 500)
if torch.cuda.is_available():
    STEPS += (1000, 2000, 4000)
TRAINING = (
    "min-SNR-5 weights in the loss, a learning rate that falls to 0 by half a cosine, a run of its "
    "own for every row, no masks where a row names none"
)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SWEEP_STEPS = 250
FAMILIES = ("faces", "vehicles")
SETS = ("flowers", *FAMILIES)
FRESH = 1024  # flowers to compare with; the families have halves
FIRST = {"data": "flowers", "tune": "anl", "seed": 0}
ABLATIONS = (
    {"tokens": 2},
    {"tokens": 4},
    {"tokens": 8},
    {"tokens": 8, "lr": 1e-3},  # with 8 tokens training diverged at 3e-3
    {"ratio": 1},
    {"ratio": 2},
    {"train_mask": 0.25},
    {"train_mask": 0.5},
    {"uncentred": True},
    {"seed": 1, "train_mask": 0.25},
    {"seed": 1, "train_mask": 0.5},
    {"seed": 2, "train_mask": 0.25},
    {"seed": 2, "train_mask": 0.5},
)
OVERFITTING_SETS = {50: ("50 flowers", 2), 200: ("flowers", 0), 1000: ("1000 flowers", 3)}  # seeds
OVERFITTING_TUNES = ("anl", "all", "attention")
OVERFITTING_STEPS = 2000

REMEDY = "start in another folder, or give the weights and the flags that it was begun with"
Rows = dict | list[dict]  # figures by name
Cell = dict[str, object]  # arguments of train; "data" is one of SETS


def cells() -> Iterator[tuple[Cell, tuple[int, ...]]]:
    """What is trained, and the steps at which it is measured; what decides defaults comes early."""
    for tune in TUNES:
        yield {**FIRST, "tune": tune}, STEPS
    for change in ABLATIONS:
        yield {**FIRST, **change}, STEPS[-1:]
    for seed in (1, 2):
        for tune in TUNES:
            yield {**FIRST, "tune": tune, "seed": seed}, STEPS
    for data in SETS[1:]:
        for tune in TUNES:
            yield {**FIRST, "data": data, "tune": tune}, STEPS


def long_runs() -> Iterator[Cell]:
    """What is trained until it may overfit, on `n` flowers each."""
    for n in OVERFITTING_SETS:
        for tune in OVERFITTING_TUNES:
            yield {"n": n, "tune": tune, "seed": 0}


def words(cell: Cell) -> str:
    """The name of a cell in results.json: "data=flowers tune=anl seed=0"."""
    return " ".join(f"{name}={value}" for name, value in cell.items())


def in_new_process(function: Callable[..., dict], **arguments: object) -> dict:
    """function(**arguments), in a process of its own: the most memory it held is its alone.

    ValueError: the process was killed. Raises what the function raises."""
    # Linux counts for a process that is spawned what the one that spawned it had held; not for one
    # that a small server has forked. Windows has no such server.
    is_there = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if is_there else "spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, **arguments).result()
        except BrokenProcessPool as error:
            raise ValueError("training was killed: is there too little memory?") from error
        except KeyboardInterrupt:  # the other process may not have got the signal
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def error_on(folder: Path, weights: Path | None, device: str | None) -> Callable[[Run], dict]:
    """(run) -> its error on the first pictures of a folder, "fresh" by name, at the times and with
    the noise of the curves that every run logs."""
    base = load_base(weights, device)
    paths = [picture.path for picture in scan(folder, base.size).pictures[:CURVE_SIZE]]
    latents, embeddings = encode(base, paths)  # N 2 C h w, N 2 D

    def error(run: Run) -> dict[str, float]:
        cond = to_condition(embeddings, run.mu, run.sigma)
        batch = curve_batch(latents, cond, torch.arange(len(paths)))
        return {"fresh": curve_loss(run, batch.to(run.base.device)).item()}

    return error


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def train_and_measure(
    out: Path, steps: int, device: str | None, fresh: Path | None = None, **arguments: object
) -> dict:
    """Train for `steps`, or go on to them -> the losses there, and the most MB that it took.

    fresh: pictures that the run does not see, and its error on which goes into its log."""
    with contextlib.redirect_stdout(io.StringIO()):
        how = {"resume": True, "sample_every": steps, "device": device}
        if fresh:
            how["watch"] = error_on(fresh, arguments.get("weights"), device)
        train(out=out, steps=steps, **how, **arguments)
    last = read_log(out)[-1]
    if last["step"] != steps:
        raise ValueError(
            f"{out} is at step {last['step']} and cannot be measured at {steps}: delete that folder"
        )
    return {
        "training loss": last["training"],
        "held-out loss": last["held_out"],
        "peak MB": peak_megabytes(pick_device(device)),
    }


def train_apart(**arguments: object) -> dict:
    """`train_and_measure` in a process of its own, and the seconds that it took."""
    begin = time.perf_counter()
    figures = in_new_process(train_and_measure, **arguments)
    return {**figures, "seconds": time.perf_counter() - begin}


def machine_name() -> str:
    """The GPU, or else the CPU and its threads, and torch's version."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = platform.machine()
    cpu_info = Path("/proc/cpuinfo")  # only Linux tells the CPU's name
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(": ")[2]
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def figure_1(runs: dict[str, list[Path]]) -> Image.Image:
    """The paper's Figure 1 for one set: a row for each way to tune, with a held-out picture and
    then a sample like it from its untouched base and from each of its runs, shortest first."""
    columns = defaultdict(list)
    for folders in runs.values():
        run = load_run(folders[0], device="cpu")
        found, _, held_out = training_set(run)
        like = to_square(open_rgb(found[held_out[0]].path), run.base.size)
        columns["like"].append(to_uint8(like))
        frames = {}  # of every run, those before its first step and after its last
        for folder in folders:
            frames |= load(folder / "state.pt", {"frames"})["frames"]
        for step, x in frames.items():
            columns[str(step)].append(x[0])
    return filmstrip({label: torch.stack(column) for label, column in columns.items()}, list(runs))


@functools.cache  # read once for all rows
def real_pictures(folder: Path, size: int) -> tuple[list[Picture], Tensor]:
    """The pictures of a folder, and what they show, (M 3 S S) uint8."""
    found = scan(folder, size).pictures
    return found, pictures([picture.path for picture in found], size)


@dataclass(frozen=True, kw_only=True)
class Options(SamplingOptions):
    """The flags of the command: how everything is sampled and measured."""

    n: int = option(512, help="samples a row")

    def check(self) -> None:
        """ValueError for numbers that cannot be, before anything is loaded."""
        super().check()
        self.plan()
        if self.n > FRESH // 2:
            raise ValueError(
                f"--n {self.n}: at most {FRESH // 2}, since {FRESH} real flowers are compared with "
                "samples and with each other"
            )

    def plan(self, rates: tuple = (0.0,), sets: tuple = ("held out",)) -> Plan:
        return Plan(rates, self.n, self.steps, self.seed, sets, self.guidance)


def training_folder(folder: Path, data: str) -> Path:
    """Where the pictures of a set lie that are trained on."""
    return folder / (f"{data} to train on" if data in FAMILIES else data)


@dataclass
class Suite:
    """The folder of a suite, what is in its results.json, and who judges."""

    folder: Path
    options: Options
    results: dict
    judge: Network
    weights: str  # see named_weights
    part: str = ""  # the beginning of the names of what is wanted

    def piece(self, key: str, make: Callable[..., Rows], *arguments: object) -> Rows:
        """The rows of this name, from results.json or else made, and then kept there with the name
        of the weights. ValueError: those that are kept are of others, or of another guidance."""
        if key in self.results:
            self.refuse_stale(key)
            return self.results[key]
        made = make(*arguments)
        weights = {"weights": self.weights}
        if isinstance(made, list):
            self.results[key] = [{**row, **weights} for row in made]
        else:
            self.results[key] = {**made, **weights}
        save(json.dumps(self.results, indent=1), self.folder / "results.json")
        print(f"{key}: {json.dumps(self.results[key])}", flush=True)
        return self.results[key]

    def refuse_stale(self, key: str) -> None:
        """ValueError: rows that are kept were measured with other weights, or another guidance."""
        _, settings = read_key(key)
        guidance = float(settings.get("guidance", self.options.guidance))
        kept = self.results[key]
        for row in kept if isinstance(kept, list) else [kept]:
            weights = row.get("weights", "unnamed weights")
            told = row.get("guidance", guidance)
            if (weights, told) != (self.weights, guidance):
                raise ValueError(
                    f"{self.folder / 'results.json'}: {key!r} is of {weights} and guidance "
                    f"{told:g}, not of {self.weights} and guidance {guidance:g}: {REMEDY}"
                )

    def train(self, data: Path, out: Path, steps: int, cell: Cell) -> dict:
        """Train a cell; without masks in training, as in the paper, where it asks for none."""
        how = {"train_mask": 0.0, **cell, "data": data}
        base = {"weights": self.options.weights, "device": self.options.device}
        return train_apart(out=out, steps=steps, **base, **how)

    def run(self, cell: Cell, steps: int | None = None) -> Path:
        """The folder of a cell's run of so many steps, or of its longest one."""
        name = words({**cell, "steps": steps or STEPS[-1]})
        return self.folder / "runs" / name.replace(" ", ",")

    def load_run(self, folder: Path) -> Run:
        return load_run(folder, self.options.weights, self.options.device)

    def sweep(self, tune: str, lr: float) -> dict:
        out = self.folder / "sweep"
        shutil.rmtree(out, ignore_errors=True)
        cell = {"tune": tune, "lr": lr, "seed": 0}
        return self.train(training_folder(self.folder, "flowers"), out, SWEEP_STEPS, cell)

    def best_rate(self, tune: str) -> float:
        """The learning rate of RATES with the lowest held-out loss after a short training."""
        losses = {}
        for lr in RATES:
            row = self.piece(sweep_key(tune, lr), self.sweep, tune, lr)
            losses[lr] = row["held-out loss"]
        return min(losses, key=losses.get)

    def real(self, data: str, size: int) -> RealPictures:
        """As many real pictures of a set as samples, and as many others: all distances are of
        equally many."""
        fresh, x = real_pictures(self.folder / f"fresh {data}", size)
        n = self.options.n
        if data not in FAMILIES:
            return RealPictures(x[:n], x[n : 2 * n], classes_of(fresh[n : 2 * n]), "fresh")
        _, others = real_pictures(training_folder(self.folder, data), size)
        n = min(n, len(x) // EACH * EACH, len(others) // EACH * EACH)
        are = "the half that was not trained on"
        return RealPictures(x[:n], others[:n], None, are)

    def row(self, cell: Cell, steps: int) -> dict:
        """Train a cell for `steps` and measure its samples from held-out conditions."""
        out = self.run(cell, steps)
        how = {"lr": self.best_rate(cell["tune"]), **cell}
        trained = self.train(training_folder(self.folder, cell["data"]), out, steps, how)
        tensors = load(out / "adapter.pt", {"trained"})["trained"]
        return {
            **trained,
            "learning rate": how["lr"],
            "trainable": sum(tensor.numel() for tensor in tensors.values()),
            **self.samples(cell, steps),
        }

    def compared(self, cell: Cell, steps: int | None = None) -> tuple[Run, RealPictures, Plan]:
        """A cell's run, what its samples are compared with, and how many of them."""
        run = self.load_run(self.run(cell, steps))
        real = self.real(cell["data"], run.base.size)
        return run, real, replace(self.options.plan(), n=len(real.reference))

    def judge_of(self, data: str) -> Network | None:
        """Who knows what pictures of a set show: of faces and vehicles nobody does."""
        return None if data in FAMILIES else self.judge

    def samples(self, cell: Cell, steps: int, guidance: float | None = None) -> dict:
        """The figures of samples of a cell's run from held-out conditions, with the guidance of
        everything or another."""
        run, real, plan = self.compared(cell, steps)
        if guidance is not None:
            plan = replace(plan, guidance=guidance)
        (figures,) = evaluate(run, real.reference, plan, self.judge_of(cell["data"]))
        return {**figures, "real are": real.are, "machine": machine_name()}

    def controls(self, cell: Cell) -> list[dict]:
        """What the samples of a set are held against; a run of it tells which pictures are trained
        on."""
        run, real, plan = self.compared(cell)
        observers = Observers(run.base, self.judge_of(cell["data"]))
        rows = control_rows(run, real, plan, observers)
        return [{**row, "machine": machine_name()} for row in rows]

    def masks(self, cell: Cell, sets: tuple[str, ...]) -> list[dict]:
        """The curve over mask rates."""
        run = self.load_run(self.run(cell))
        found, x = real_pictures(self.folder / "fresh flowers", run.base.size)
        plan = self.options.plan(MASK_RATES, sets)
        return evaluate(run, x, plan, self.judge, classes=classes_of(found))

    def text(self, cell: Cell) -> dict:
        run = self.load_run(self.run(cell))
        found, _ = real_pictures(self.folder / "fresh flowers", run.base.size)
        return text_figures(
            run, found, self.judge, steps=self.options.steps, guidance=self.options.guidance
        )

    def learners(self) -> list[dict]:
        """Semi-supervised learning with variations painted by a run on the unlabelled pictures."""
        folder = self.folder / "semi_supervised"
        draw_sets(folder)
        how = {"seed": 0, "lr": self.best_rate("anl")}
        self.train(folder / "unlabelled", folder / "run", STEPS[-1], how)
        run = self.load_run(folder / "run")
        guidance = self.options.guidance
        rows = compare(run, folder, guidance=guidance)
        return [{**row, "guidance": guidance} for row in rows]

    def overfit(self, cell: Cell) -> dict:
        """A long run on `n` flowers, and its errors on the way: [step, of training pictures, of
        fresh ones], both fixed, the latter the same for all runs."""
        name, seed = OVERFITTING_SETS[cell["n"]]
        draw_once(self.folder / name, cell["n"], seed)
        out = self.folder / "runs" / f"overfitting {words(cell)}".replace(" ", ",")
        lr = self.best_rate(cell["tune"])
        how = {"tune": cell["tune"], "seed": cell["seed"], "lr": lr}
        how["fresh"] = self.folder / "fresh flowers"
        trained = self.train(self.folder / name, out, OVERFITTING_STEPS, how)
        curve = [[line["step"], line["training"], line["fresh"]] for line in read_log(out)]
        at_step, _, least = min(curve, key=lambda point: point[2])
        return {
            "learning rate": lr,
            "least held-out loss": least,
            "at step": at_step,
            "last held-out loss": curve[-1][2],
            "seconds": trained["seconds"],
            "machine": machine_name(),
            "curve": curve,
        }

    def figure(self, data: str) -> None:
        """Draw Figure 1 of a set into the folder, once all its rows are there."""
        path = self.folder / f"{data}.png"
        cells = {tune: {**FIRST, "data": data, "tune": tune} for tune in TUNES}
        keys = {f"{words(cell)} steps={steps}" for cell in cells.values() for steps in STEPS}
        if keys <= self.results.keys() and not path.exists():
            runs = {tune: [self.run(cell, n) for n in STEPS] for tune, cell in cells.items()}
            save(figure_1(runs), path)

    def comparisons(self, cell: Cell) -> Iterator[tuple]:
        """What a set's row of ANL is held against: itself without guidance; and controls, once for
        all seeds."""
        first = {**FIRST, "data": cell["data"]}
        if cell == {**first, "seed": cell["seed"]} and self.options.guidance != 1:
            key = f"{words(cell)} steps={STEPS[-1]} guidance=1"
            yield key, self.samples, cell, STEPS[-1], 1.0
        if cell == first:
            yield f"controls data={cell['data']}", self.controls, cell

    def curves(self, cell: Cell) -> Iterator[tuple]:
        """The mask curve and the figures of text, of the cells whose difference they may show."""
        change = {name: value for name, value in cell.items() if FIRST.get(name) != value}
        key = "".join(f" {name}={value}" for name, value in change.items())
        if change.keys() <= {"train_mask", "uncentred", "seed"}:
            sets = ("held out",) if change else ("training", "held out")
            yield f"masks{key}", self.masks, cell, sets
        if change.keys() <= {"train_mask", "seed"}:
            yield f"text{key}", self.text, cell

    def pieces(self) -> Iterator[tuple]:
        """Of every piece its name, what makes it, and from what, in the order of their making."""
        for tune in TUNES:
            for lr in RATES:
                yield sweep_key(tune, lr), self.sweep, tune, lr
        for cell, checkpoints in cells():
            for steps in checkpoints:
                yield f"{words(cell)} steps={steps}", self.row, cell, steps
            yield from self.comparisons(cell)
            yield from self.curves(cell)
            if "uncentred" in cell:  # what comes now repeats, or tells of other sets
                yield "semi-supervised", self.learners
        for cell in long_runs():
            yield f"overfitting {words(cell)}", self.overfit, cell

    def wanted(self) -> list[tuple]:
        """The pieces of the part that is wanted. ValueError: it has none."""
        found = [piece for piece in self.pieces() if piece[0].startswith(self.part)]
        if not found:
            raise ValueError(f"--part {self.part!r}: no name of a row begins so")
        return found

    def all(self) -> None:
        """Make what results.json lacks of all that is wanted, and the rates that it takes."""
        for key, make, *arguments in self.wanted():
            self.piece(key, make, *arguments)
            for data in SETS:
                self.figure(data)


def sweep_key(tune: str, lr: float) -> str:
    return f"sweep tune={tune} lr={lr:g}"


def draw_once(folder: Path, n: int, seed: int) -> None:
    """Draw flowers, where they are not there yet."""
    if not (folder / "metadata.jsonl").exists():
        write(folder, n, seed=seed)


def halve(folder: Path, name: str) -> None:
    """Copy half of a family's pictures to train on and the others to measure with, where they are
    not there yet. All drawings of one thing fall into the same half."""
    lines = (folder / name / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    things = list(dict.fromkeys(tuple(row["tags"]) for row in rows))
    halves = {training_folder(folder, name): things[::2], folder / f"fresh {name}": things[1::2]}

    def pictures_of(found: list[dict]) -> Iterator[tuple[Image.Image, dict]]:
        for row in found:
            path = folder / name / row["file"]
            yield open_rgb(path), {key: row[key] for key in ("text", "tags", "subgroup")}

    for out, kept in halves.items():
        if not (out / "metadata.jsonl").exists():
            found = [row for row in rows if tuple(row["tags"]) in kept]
            save_set(out, pictures_of(found), len(found))


def named_weights(options: Options) -> str:
    """The weights as rows name them, by what is in them: "unet 0123abcd, autoencoder ..."."""
    fingerprints = load_base(options.weights, options.device).fingerprints()
    return ", ".join(f"{part} {digits[:8]}" for part, digits in fingerprints.items())


def refuse_other_setup(kept: dict, setup: dict, path: Path) -> None:
    """ValueError: the rows in `path` were begun with another setup. The machine may be another, and
    a judge that is trained anew a little better or worse."""
    for name, value in setup.items():
        if name not in ("machine", "judge's accuracy") and kept.get(name) != value:
            raise ValueError(f"{path} has {name} {kept.get(name)}, not {value}: {REMEDY}")


def suite(folder: Path, options: Options, part: str = "") -> dict:
    """Make all that results.json lacks -> its content. It is written after every piece.

    part: the beginning of the names of what is made. FileNotFoundError: faces or vehicles are
    missing. ValueError: what is there was made with other weights or flags, or there is no such
    part. OSError: another process is at it, and each would overwrite the other's rows.
    """
    options.check()
    Suite(folder, options, {}, None, "", part).wanted()  # a mistake is said before anything slow
    for name in FAMILIES:
        if not (folder / name / "metadata.jsonl").exists():
            raise FileNotFoundError(
                f"no {folder / name}: python -m tinyanl.pretrain families --data ./emoji "
                f"--out {folder}"
            )
    with claim(folder):
        return make_all(folder, options, part)


def make_all(folder: Path, options: Options, part: str) -> dict:
    """What `suite` does once the folder is its own."""
    draw_once(folder / "flowers", 200, seed=0)
    draw_once(folder / "fresh flowers", FRESH, seed=1)
    for name in FAMILIES:
        halve(folder, name)
    judge, accuracy = train_judge(folder / "judge")
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    pieces = Suite(folder, options, results, judge, named_weights(options), part)
    setup = {
        "machine": machine_name(),
        "samples": options.n,
        "DDIM steps": options.steps,
        "weights": pieces.weights,
        "judge's accuracy": accuracy,
        "training": TRAINING,
        "sampling": f"guidance {options.guidance:g}, seed {options.seed}",
    }
    refuse_other_setup(results.get("setup", setup), setup, path)
    pieces.piece("setup", dict, setup)
    pieces.all()
    return results


def main(argv: list[str] | None = None) -> None:
    p = command("experiments.suite", __doc__)
    p.add_argument("folder", type=Path, help="for all that is made; it holds faces and vehicles")
    p.add_argument(
        "--report", action="store_true", help="only write results.md from results.json"
    )
    p.add_argument(
        "--part",
        default="",
        help='make only rows whose name begins so: overfitting, "sweep tune=anl", data=faces ...',
    )
    add_options(p, Options)
    args = vars(p.parse_args(argv))
    folder = args.pop("folder")
    only_report = args.pop("report")
    part = args.pop("part")
    with mistakes_in_one_line(p, "stopped: the same command keeps the finished rows and goes on"):
        if only_report:
            print(write_report(folder))
            return
        suite(folder, Options(**args), part)
        print(folder / "results.json")


if __name__ == "__main__":
    main()
