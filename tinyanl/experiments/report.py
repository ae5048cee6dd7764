"""results.md from results.json: every table of what was measured, with its command, machine, seeds.

    python -m tinyanl.experiments.suite ./tutorials --report

A key of results.json says what its figures are of: "sweep tune=anl lr=0.001" is a row of the kind
"sweep" with two settings; the rows of a list share the settings of their key. Rows that differ in
nothing but the seed become one line, mean ± standard deviation. Results that were measured by hand
describe themselves: {"text", "command", "machine", "weights", "rows"}. Of what is not there no
table is made, and what no table asks for comes last, as it is.
"""
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..runs import save
from ..table import table

SUITE = "python -m tinyanl.experiments.suite ./suite"
# Figures of a row that tell how it was made
CONDITIONS = ("conditions", "rate", "guidance", "labels a kind", "learned from")
PLAIN = {"data", "tune", "seed", "steps", "guidance", "conditions", "rate"}  # no ablation
SAMPLED = ("training", "held out")  # conditions of samples of a run; others are controls
CONTROLS = {
    "base": "samples of the untouched U-Net, told nothing",
    "copies": "the training pictures nearest to each condition",
    "reconstructions": "real pictures through the first stage: the ceiling",
    "real": "real pictures against other real ones: the floor",
}
LOSSES = ("training loss", "held-out loss")
QUALITY = (
    "1000 FD_clip",
    "precision",
    "recall",
    "within",
    "nearest training picture",
    "right kind",
    "right colour",
    "right kind and colour",
)
DIGITS = {
    "training loss": 4,
    "held-out loss": 4,
    "least held-out loss": 4,
    "last held-out loss": 4,
    "at step": 0,
    "1000 FD_clip": 0,
    "seconds": 0,
    "peak MB": 0,
}
HEADINGS = {
    "training loss": "error, training",
    "held-out loss": "error, held out",
    "least held-out loss": "least error, held out",
    "last held-out loss": "error at the end, held out",
}
# Beginnings of the names of shares -> digits of their percentages
SHARES = {"right": 0, "chance": 0, "accuracy": 0, "spread": 0, "R-precision": 1, "judge's": 1}
DESCRIBED = ("training", "sampling")  # parts of the setup that are said in words
SEEDED = ("masks", "text", "sweep")  # kinds of rows that are of seed 0 where their key names none
LEGEND = """\
Error: of the guessed noise, on fixed pictures, times and noise. 1000 FD_clip: a thousand times the
Frechet distance to real pictures in CLIP's space, small is good; CLIP conditioned the samples,
which flatters them.
Precision: share of samples that lie among real pictures. Recall: share of real pictures that have a
sample near. Within: diversity of the samples of one condition, 1 - cosine. Nearest training
picture: the cosine of a sample with it, by CLIP. Kind and colour: the share that a network of its
own finds right. After ±: the standard deviation over seeds."""


@dataclass(frozen=True)
class Row:
    """What was measured once."""

    kind: str  # the words of its key that are no settings
    settings: dict[str, object]
    figures: dict[str, object]
    machine: str
    weights: str


@dataclass
class Section:
    """Tables under a heading, and the rows that they were made of."""

    title: str
    text: str
    rows: list[Row]
    tables: list[str]
    command: str = SUITE
    pictures: list[str] = field(default_factory=list)  # names of files, without their ending


def said_weights(result: dict, setup: dict) -> str:
    """The weights that a result was measured with, as the report says them: by their commit where
    it is known. Those of the setup where the result names none."""
    is_known = "weights commit" in result
    if not is_known and result.get("weights", setup.get("weights")) == setup.get("weights"):
        result = setup
    if "weights commit" in result:
        return f"the embedded weights of commit {result['weights commit']}"
    return result.get("weights", "unnamed weights")


def read_key(key: str) -> tuple[str, dict[str, object]]:
    """ "masks seed=1" -> "masks", {"seed": "1"}."""
    settings = {}
    words = []
    for word in key.split():
        name, is_setting, value = word.partition("=")
        if is_setting:
            settings[name] = value
        else:
            words.append(word)
    return " ".join(words), settings


def read_rows(results: dict) -> list[Row]:
    """All rows of results.json, but what describes the whole of it or describes itself."""
    setup = results.get("setup", {})
    rows = []
    for key, result in results.items():
        if key in ("setup", "conclusions") or describes_itself(result):
            continue
        kind, settings = read_key(key)
        if kind in SEEDED:
            settings.setdefault("seed", "0")
        for figures in result if isinstance(result, list) else [result]:
            if not isinstance(figures, dict):
                figures = {"value": figures}
            made = {name: figures[name] for name in CONDITIONS if name in figures}
            measured = {
                name: value
                for name, value in figures.items()
                if name not in (*CONDITIONS, "machine", "weights commit", "weights")
            }
            machine = figures.get("machine", setup.get("machine", "unnamed machine"))
            weights = said_weights(figures, setup)
            rows.append(Row(kind, {**settings, **made}, measured, machine, weights))
    return rows


def describes_itself(result: object) -> bool:
    return isinstance(result, dict) and "rows" in result


def unit_of(name: str) -> tuple[float, int, str]:
    """Factor, digits and unit in which a figure is shown."""
    for beginning, digits in SHARES.items():
        if name.startswith(beginning):
            return 100, digits, " %"
    if name == "trainable":
        return 1e-6, 1, " M"
    return 1, DIGITS.get(name, 2), ""


def format_figure(name: str, values: list) -> str:
    """A figure of every seed -> mean ± standard deviation, in the unit and digits of its name; as
    it is where all seeds have the same."""
    first = values[0]
    if not all(isinstance(value, int | float) for value in values):
        return str(first)
    if name == "learning rate":
        return f"{first:g}"
    factor, digits, unit = unit_of(name)
    are_equal = len(set(values)) == 1
    if are_equal and isinstance(first, int) and factor == 1:
        return f"{first:,}"
    mean = f"{factor * statistics.mean(values):,.{digits}f}"
    if are_equal:
        return mean + unit
    return f"{mean} ± {factor * statistics.stdev(values):,.{digits}f}{unit}"


def heading(name: str) -> str:
    """A figure's name as the head of a column."""
    return HEADINGS.get(name, name)


def over_seeds(
    rows: list[Row], names: tuple[str, ...], first: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Lines of a table: one for all rows whose settings are the same but for the seed.

    Settings that are the same in all rows are left out, but for those named `first`; figures that
    no row has, too. Where lines differ in how many seeds they have, a column says it."""
    groups = defaultdict(list)
    for row in rows:
        made = {name: value for name, value in row.settings.items() if name != "seed"}
        groups[tuple(made.items())].append(row)
    settings = dict.fromkeys(k for row in rows for k in row.settings if k != "seed")
    varying = []
    for name in settings:
        if name in first or len({str(row.settings.get(name)) for row in rows}) > 1:
            varying.append(name)
    have_equal_seeds = len({len(group) for group in groups.values()}) == 1
    lines = []
    for made, group in groups.items():
        values = dict(made)
        line = {name: "" if values.get(name) is None else str(values[name]) for name in varying}
        for name in names:
            measured = [r.figures[name] for r in group if r.figures.get(name) is not None]
            if measured:
                line[heading(name)] = format_figure(name, measured)
        if not have_equal_seeds:
            line["seeds"] = str(len(group))
        lines.append(line)
    return lines


def table_across(rows: list[Row], down: str, right: str, figure: str) -> list[dict[str, str]]:
    """Lines of a table of one figure: the setting `down` tells the lines apart, and guidance where
    a line would have more than one; `right` tells the columns apart."""
    columns = sorted({row.settings[right] for row in rows}, key=float)
    guidance = defaultdict(set)  # line -> all that there are
    for row in rows:
        guidance[row.settings[down]].add(row.settings.get("guidance"))
    groups = defaultdict(lambda: defaultdict(list))  # line -> column -> figures of all seeds
    for row in rows:
        name = row.settings[down]
        if len(guidance[name]) > 1 and "guidance" in row.settings:
            name += f", guidance {row.settings['guidance']}"
        groups[name][row.settings[right]].append(row.figures[figure])
    lines = []
    for name, group in groups.items():
        line = {down: name}
        for column in columns:
            values = group.get(column)
            line[f"{right} {column}"] = format_figure(figure, values) if values else ""
        lines.append(line)
    return lines


def is_control(row: Row) -> bool:
    """Whether these pictures are no samples of a run: real ones, reconstructions ..."""
    return row.settings.get("conditions", "held out") not in SAMPLED


def controls(rows: list[Row], data: str) -> list[Row]:
    """What the samples of a set are held against, each named once."""
    found = {}
    for row in sorted(rows, key=lambda row: row.kind != "controls"):  # these come first
        is_first_curve = row.kind == "masks" and row.settings.keys() <= {"seed", *CONDITIONS}
        is_first_curve = is_first_curve and row.settings["seed"] == "0"
        of_the_set = row.settings.get("data", "flowers") == data
        if of_the_set and is_control(row) and (is_first_curve or row.kind == "controls"):
            settings = {"tune": row.settings["conditions"], "seed": row.settings.get("seed", "0")}
            named = Row(row.kind, settings, row.figures, row.machine, row.weights)
            found.setdefault(tuple(settings.values()), named)
    return list(found.values())


def tuning(rows: list[Row]) -> dict[str, list[Row]]:
    """Set of pictures -> the rows of all ways to tune it, at all steps."""
    found = defaultdict(list)
    for row in rows:
        if row.kind == "" and {"data", "tune", "steps"} <= row.settings.keys() <= PLAIN:
            found[row.settings["data"]].append(row)
    return found


def last_steps(rows: list[Row]) -> str:
    """The most steps that every way to tune has a row of, or else any of them."""
    steps = defaultdict(set)
    for row in rows:
        steps[row.settings["tune"]].add(row.settings["steps"])
    common = set.intersection(*steps.values()) or set.union(*steps.values())
    return max(common, key=int)


def without(row: Row, *names: str) -> Row:
    """The row, less some of its settings."""
    settings = {name: value for name, value in row.settings.items() if name not in names}
    return Row(row.kind, settings, row.figures, row.machine, row.weights)


def ways_to_tune(rows: list[Row]) -> Iterator[Section]:
    for data, found in tuning(rows).items():
        steps = last_steps(found)
        finished = [row for row in found if row.settings["steps"] == steps]
        fixed = [without(row, "data", "steps", "conditions", "rate") for row in finished]
        held_against = controls(rows, data)
        columns = ("trainable", *LOSSES, *QUALITY)
        real = finished[0].figures.get("real are", "fresh")
        text = (
            f"After {steps} steps; samples from held-out conditions, against real pictures "
            f"({real}). A learning rate for each way, by the sweep below."
        )
        if held_against:
            names = dict.fromkeys(row.settings["tune"] for row in held_against)
            said = [f"{name} ({CONTROLS[name]})" for name in names if name in CONTROLS]
            text += f" The last lines are controls, of as many pictures: {', '.join(said)}."
        lines = over_seeds(fixed, columns, first=("tune",))
        lines += over_seeds(held_against, columns, first=("tune",))
        shown = [*finished, *held_against]
        yield Section(f"Ways to tune: {data}", text, shown, [table(lines)], pictures=[data])


def by_steps(rows: list[Row]) -> Iterator[Section]:
    for data, found in tuning(rows).items():
        tables = []
        for figure in ("held-out loss", "training loss", "1000 FD_clip", "precision"):
            measured = [row for row in found if figure in row.figures]
            if measured:
                lines = table_across(measured, "tune", "steps", figure)
                tables.append(f"**{heading(figure)}**\n\n{table(lines)}")
        text = "The same ways after fewer and more steps."
        yield Section(f"By steps of training: {data}", text, found, tables)


def where_worse(rows: list[Row], others: list[Row]) -> str:
    """From which step on the held-out error of some runs stays above that of others, in words; the
    mean over the seeds that both have. "" where they have none in common."""
    curves = {row.settings["seed"]: row.figures["curve"] for row in others}
    excess = defaultdict(list)  # step -> of every seed
    for row in rows:
        curve = curves.get(row.settings["seed"], [])
        for (step, _, error), (_, _, other) in zip(row.figures["curve"], curve, strict=False):
            excess[step].append(error - other)
    is_worse = [statistics.mean(values) > 0 for values in excess.values()]
    if not is_worse:
        return ""
    if not any(is_worse):
        return "never"
    if not is_worse[-1]:
        return f"at {sum(is_worse)} of {len(is_worse)} steps, but not at the last"
    lasting = is_worse[::-1].index(False) if False in is_worse else len(is_worse)
    return f"from step {list(excess)[-lasting]:,} on"


def overfitting(rows: list[Row]) -> Iterator[Section]:
    found = [row for row in rows if row.kind == "overfitting"]
    if found:
        groups = defaultdict(list)
        for row in found:
            groups[row.settings["n"], row.settings["tune"]].append(row)
        figures = ("least held-out loss", "at step", "last held-out loss")
        lines = over_seeds(found, figures, first=("n", "tune"))
        for line in lines:
            n, tune = line["n"], line["tune"]
            if tune != "anl":
                line["worse than anl"] = where_worse(groups[n, tune], groups[n, "anl"])
        steps = max(row.figures["curve"][-1][0] for row in found)
        text = (
            f"Runs of {steps:,} steps, by which the learning rate falls to 0, without masks, on n "
            "flowers less the tenth that a run leaves out. Error held out: on the same 64 fresh "
            "flowers for all runs. Worse than anl: where that error is above the one of anl on as "
            "many flowers; from a step on, if it stays there to the end."
        )
        yield Section("Overfitting", text, found, [table(lines)])


def training_cost(rows: list[Row]) -> Iterator[Section]:
    """Seconds and memory of the runs of seed 0 on flowers, which one machine has trained."""
    found = [row for row in tuning(rows)["flowers"] if row.settings.get("seed") == "0"]
    lines = []
    for tune in dict.fromkeys(row.settings["tune"] for row in found):
        runs = [row.figures for row in found if row.settings["tune"] == tune]
        runs = [figures for figures in runs if "seconds" in figures]
        seconds = [figures["seconds"] for figures in runs]
        peaks = [figures["peak MB"] for figures in runs if "peak MB" in figures]
        if seconds and peaks:
            starts = len(runs)
            line = {"tune": tune, "starts": str(starts)}
            line["seconds"] = format_figure("seconds", [sum(seconds)])
            line["peak MB"] = format_figure("peak MB", [max(peaks)])
            lines.append(line)
    if lines:
        text = "All rows of a way to tune together; each of them was a start of its own."
        yield Section("What training costs: flowers", text, found, [table(lines)])


def learning_rates(rows: list[Row]) -> Iterator[Section]:
    found = [row for row in rows if row.kind == "sweep"]
    if found:
        text = "Error on held-out flowers after a short training, by learning rate."
        lines = table_across(found, "tune", "lr", "held-out loss")
        yield Section("Learning rates", text, found, [table(lines)])


def named_change(row: Row) -> Row:
    """The row, with all settings that only some runs have as one, named "changed"."""
    changes = {name: value for name, value in row.settings.items() if name not in PLAIN}
    words = " ".join(f"{name}={value}" for name, value in changes.items())
    plain = without(row, *changes)
    settings = {"changed": words or "nothing", **plain.settings}
    return Row(row.kind, settings, row.figures, row.machine, row.weights)


def ablations(rows: list[Row]) -> Iterator[Section]:
    changed = [row for row in rows if row.kind == "" and not row.settings.keys() <= PLAIN]
    if changed:
        steps = {row.settings.get("steps") for row in changed}
        guidance = {row.settings.get("guidance") for row in changed}
        base = [
            row
            for row in tuning(rows)["flowers"]
            if row.settings["tune"] == "anl"
            and row.settings["steps"] in steps
            and row.settings.get("guidance") in guidance
        ]
        every = [named_change(without(row, "conditions", "rate")) for row in [*base, *changed]]
        text = "ANL on flowers. The first line is what the others change."
        columns = ("learning rate", "trainable", *LOSSES, *QUALITY)
        lines = over_seeds(every, columns, first=("changed",))
        yield Section("One thing changed", text, [*base, *changed], [table(lines)])


def by_change(rows: list[Row], kind: str) -> dict[str, list[Row]]:
    """Rows of a kind by what was changed in the run: "train_mask=0.5" ..., "" for nothing."""
    found = defaultdict(list)
    for row in rows:
        if row.kind == kind:
            changes = [
                f"{name}={value}"
                for name, value in row.settings.items()
                if name not in ("seed", *CONDITIONS)
            ]
            found[" ".join(changes)].append(row)
    return found


def mask_curves(rows: list[Row]) -> Iterator[Section]:
    found = by_change(rows, "masks")
    if found:
        tables = []
        for change, curve in found.items():
            guidance = {row.settings["guidance"] for row in curve if "guidance" in row.settings}
            same = ["guidance"] if len(guidance) == 1 else []  # real pictures have none
            plain = [without(row, *read_key(change)[1], *same) for row in curve]
            lines = over_seeds(plain, QUALITY)
            title = change or "as the paper does it: no masks in training"
            tables.append(f"**{title}**\n\n{table(lines)}")
        text = "ANL on flowers, with a part of the condition hidden while sampling."
        every = [row for curve in found.values() for row in curve]
        yield Section("Mask rates", text, every, tables)


def word_figures(rows: list[Row]) -> Iterator[Section]:
    found = [row for row in rows if row.kind == "text"]
    if found:
        names = tuple(dict.fromkeys(name for row in found for name in row.figures))
        text = (
            "Samples from a caption for each colour and kind, by adapters trained on pictures "
            "alone. R-precision: the share whose best caption of all is their own."
        )
        lines = over_seeds(found, names)
        for line in lines:
            if "train_mask" in line:
                line["train_mask"] = line["train_mask"] or "0"
        yield Section("Words", text, found, [table(lines)])


def learners(rows: list[Row]) -> Iterator[Section]:
    for change, found in by_change(rows, "semi-supervised").items():
        lines = {}
        others = []
        for row in found:
            count = row.settings.get("labels a kind")
            way = row.settings.get("learned from")
            if count is None or way is None or "accuracy" not in row.figures:
                others.append(row)
                continue
            accuracy = f"{100 * row.figures['accuracy']:.0f}"
            if "spread" in row.figures:
                accuracy += f" ± {100 * row.figures['spread']:.0f}"
            line = lines.setdefault(way, {"learned from": way})
            line[f"labels a kind: {count}"] = f"{accuracy} %"
        tables = [table(list(lines.values()))] if lines else []
        if others:
            tables.append(table(as_they_are(others)))
        text = (
            "Accuracy on test pictures of a network that learned their kind from few labels, "
            "with and without generated variations of these and FixMatch on unlabelled pictures."
        )
        seeds = {row.figures["seeds"] for row in found if "seeds" in row.figures}
        if seeds:
            text += f" Seeds of each: {', '.join(map(str, sorted(seeds)))}."
        title = f"Semi-supervised learning {change}".strip()
        yield Section(title, text, found, tables)


def as_they_are(rows: list[Row]) -> list[dict]:
    """Lines of a table with all settings and figures."""
    return [{**row.settings, **row.figures} for row in rows]


def self_described(results: dict) -> Iterator[Section]:
    """The results that describe themselves."""
    for title, result in results.items():
        if describes_itself(result):
            machine = result.get("machine", "named in the table")
            weights = said_weights(result, results.get("setup", {}))
            rows = [Row(title, {}, line, machine, weights) for line in result["rows"]]
            command = result.get("command", "")
            text = result.get("text", "")
            yield Section(title, text, rows, [table(result["rows"])], command)


def the_rest(rows: list[Row]) -> Iterator[Section]:
    for kind in dict.fromkeys(row.kind for row in rows):
        found = [row for row in rows if row.kind == kind]
        yield Section(kind or "Other runs", "", found, [table(as_they_are(found))])


TABLES: tuple[Callable[[list[Row]], Iterator[Section]], ...] = (
    ways_to_tune,
    by_steps,
    overfitting,
    training_cost,
    ablations,
    mask_curves,
    word_figures,
    learners,
    learning_rates,
)


def sections(results: dict) -> list[Section]:
    """Everything that results.json holds, in the order of the report."""
    rows = read_rows(results)
    made = [section for make in TABLES for section in make(rows)]
    used = {id(row) for section in made for row in section.rows}
    used |= {id(row) for row in rows if row.kind == "controls" or is_control(row)}
    rest = the_rest([row for row in rows if id(row) not in used])
    return [*made, *rest, *self_described(results)]


def weights_line(made: list[Section]) -> str:
    """With which weights each table was measured."""
    titles = defaultdict(list)
    for section in made:
        weights = " and ".join(dict.fromkeys(row.weights for row in section.rows))
        titles[weights].append(section.title)
    most = max(titles, key=lambda weights: len(titles[weights]))
    parts = [f"All tables were measured with {most}"]
    for weights, few in titles.items():
        if weights != most:
            parts.append(f"but with {weights}: {', '.join(few)}")
    return "; ".join(parts) + "."


def in_markdown(section: Section, folder: Path) -> str:
    """A section with its command, machines and seeds, and those of its pictures that `folder` or
    its `pictures` has."""
    parts = [f"## {section.title}"]
    if section.text:
        parts.append(section.text)
    seeds = sorted({row.settings["seed"] for row in section.rows if "seed" in row.settings})
    origin = [f"`{section.command}`"] if section.command else []
    origin.append("; ".join(dict.fromkeys(row.machine for row in section.rows)))
    if seeds:
        origin.append(f"seeds {', '.join(seeds)}" if len(seeds) > 1 else f"seed {seeds[0]}")
    parts.append(". ".join(origin) + ".")
    parts += section.tables
    for name in section.pictures:
        for path in (f"pictures/{name}.png", f"{name}.png"):
            if (folder / path).exists():
                parts.append(f"![{section.title}, after 0 steps and more]({path})")
                break
    return "\n\n".join(parts)


def report(results: dict, folder: Path) -> str:
    """The content of results.json -> that of results.md, which lies in `folder`.

    ValueError: there is nothing to report."""
    made = sections(results)
    if not made:
        raise ValueError(f"results.json of {folder} holds no results yet: run the suite first")
    setup = results.get("setup", {})
    others = ("machine", "weights", "weights commit", *DESCRIBED)
    figures = {k: v for k, v in setup.items() if k not in others}
    said = [f"{name.capitalize()}: {setup[name]}" for name in DESCRIBED if name in setup]
    if figures:
        said.insert(0, ", ".join(f"{k} {format_figure(k, [v])}" for k, v in figures.items()))
    parts = ["# What was measured", weights_line(made), LEGEND]
    if said:
        parts.append(f"Unless a table says otherwise: {'. '.join(said)}.")
    parts.append(
        "Made from [results.json](results.json), never by hand: "
        "`python -m tinyanl.experiments.suite ./tutorials --report`."
    )
    parts += [in_markdown(section, folder) for section in made]
    if "conclusions" in results:
        lines = [f"- {sentence}" for sentence in results["conclusions"]]
        parts += ["## What we conclude", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path) -> Path:
    """Write the results.md of a folder with a results.json. FileNotFoundError: it has none."""
    source = folder / "results.json"
    if not source.exists():
        raise FileNotFoundError(f"no {source}: run the suite into {folder} first")
    out = folder / "results.md"
    save(report(json.loads(source.read_text()), folder), out)
    return out
