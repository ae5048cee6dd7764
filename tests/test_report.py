"""results.md is what the code makes of results.json."""

import json
import math
import re
from pathlib import Path

import pytest
from commands import one_line, section_of, table_lines

from tinyanl.experiments import report as module
from tinyanl.experiments.report import (
    format_figure,
    over_seeds,
    read_key,
    read_rows,
    report,
    write_report,
)
from tinyanl.experiments.suite import main

TUTORIALS = Path(__file__).parents[1] / "tutorials"


@pytest.fixture(scope="module")
def results():
    return json.loads((TUTORIALS / "results.json").read_text())


def line_of(text: str, first: str) -> dict[str, str]:
    """The first line of a table that begins so, by the heads of its columns."""
    head, *lines = table_lines(text)
    return dict(zip(head, next(line for line in lines if line[0] == first), strict=True))


def test_results_md_is_what_the_code_makes_of_results_json(results):
    made = report(results, TUTORIALS)
    assert (TUTORIALS / "results.md").read_text() == made, (
        "make it again: python -m tinyanl.experiments.suite ./tutorials --report"
    )


def test_the_first_line_names_the_weights_of_every_table(results):
    first = report(results, TUTORIALS).split("\n\n")[1]
    commit = results["setup"]["weights commit"]
    assert f"with the embedded weights of commit {commit}" in first
    assert "random weights: Speed beside diffusers" in first
    older = {**results, "text": {**results["text"], "weights commit": "0123abc"}}
    first = report(older, TUTORIALS).split("\n\n")[1]
    both = sorted(re.findall(r"commit (\w+)", first.split(": Words")[0].rpartition("; ")[2]))
    assert both == sorted(["0123abc", commit])


def test_rows_that_name_their_weights_are_told_by_the_commit_of_these(tmp_path):
    results = small(text={"samples": 32, "weights": "unet 0"})
    for key, row in results.items():
        if key != "text":
            row["weights"] = "unet 1"
    first = report(results, tmp_path).split("\n\n")[1]
    assert "measured with the embedded weights of commit abc1234; but with unet 0: Words" in first
    del results["setup"]["weights commit"]
    first = report(results, tmp_path).split("\n\n")[1]
    assert "measured with unet 1; but with unet 0: Words" in first


@pytest.mark.parametrize(
    "key, kind, settings",
    [
        ("data=flowers tune=anl seed=0", "", {"data": "flowers", "tune": "anl", "seed": "0"}),
        ("sweep tune=anl lr=0.001", "sweep", {"tune": "anl", "lr": "0.001"}),
        ("masks", "masks", {}),
        ("two words seed=1", "two words", {"seed": "1"}),
    ],
)
def test_a_key_is_a_kind_and_settings(key, kind, settings):
    assert read_key(key) == (kind, settings)


@pytest.mark.parametrize(
    "name, values, text",
    [
        ("held-out loss", [0.5], "0.5000"),
        ("held-out loss", [1.0, 2.0, 3.0], "2.0000 ± 1.0000"),
        ("precision", [0.25, 0.25], "0.25"),
        ("right kind and colour", [0.25, 0.75], f"50 ± {100 * math.sqrt(0.125):.0f} %"),
        ("judge's accuracy", [0.998], "99.8 %"),
        ("trainable", [3_409_920], "3.4 M"),
        ("peak MB", [1186.0], "1,186"),
        ("samples", [1024, 1024], "1,024"),
        ("learning rate", [0.003], "0.003"),
        ("real are", ["fresh", "fresh"], "fresh"),
    ],
)
def test_a_figure_has_the_digits_and_the_unit_of_its_name(name, values, text):
    assert format_figure(name, values) == text


def small(**more) -> dict:
    """Results of two ways to tune, one of which has two seeds."""
    row = {"held-out loss": 0.1, "trainable": 2_000_000, "precision": 0.5}
    return {
        "setup": {"machine": "a machine", "weights commit": "abc1234", "samples": 32},
        "data=flowers tune=anl seed=0 steps=60": {**row, "held-out loss": 0.4},
        "data=flowers tune=anl seed=0 steps=500": row,
        "data=flowers tune=anl seed=1 steps=500": {**row, "held-out loss": 0.3},
        "data=flowers tune=all seed=0 steps=60": row,
        "data=flowers tune=all seed=0 steps=500": {**row, "machine": "another"},
        "data=flowers tune=all seed=0 steps=2000": row,
        **more,
    }


def test_how_rows_were_trained_and_sampled_is_said_in_words(tmp_path):
    how = {**small()["setup"], "training": "at a constant rate", "sampling": "guidance 1"}
    said = "otherwise: samples 32. Training: at a constant rate. Sampling: guidance 1."
    assert said in report(small(setup=how), tmp_path)
    assert "otherwise: samples 32.\n" in report(small(), tmp_path)


def test_seeds_are_one_line_and_machines_and_seeds_are_named(tmp_path):
    text = section_of(report(small(), tmp_path), "Ways to tune: flowers")
    assert "a machine; another. seeds 0, 1." in text and "After 500 steps" in text
    anl = line_of(text, "anl")
    assert anl["error, held out"] == f"0.2000 ± {math.sqrt(0.02):.4f}" and anl["seeds"] == "2"
    assert line_of(text, "all")["seeds"] == "1"
    steps = section_of(report(small(), tmp_path), "By steps of training: flowers")
    assert line_of(steps, "anl")["steps 2000"] == "" and "steps 60" in line_of(steps, "all")


def test_what_differs_in_more_than_the_seed_is_never_averaged(tmp_path):
    at = {"conditions": "held out", "rate": 0.0, "precision": 0.5}
    masks = [{**at, "guidance": 1.0}, {**at, "guidance": 2.0, "precision": 0.7}]
    made = report(small(masks=masks), tmp_path)
    assert table_lines(section_of(made, "Mask rates")) == [
        ["guidance", "precision"],
        ["1.0", "0.50"],
        ["2.0", "0.70"],
    ]
    guided = {"data=flowers tune=all seed=0 steps=60 guidance=2": {"held-out loss": 0.5}}
    steps = section_of(report(small(**guided), tmp_path), "By steps of training: flowers")
    assert line_of(steps, "all")["steps 60"] == "0.1000"
    assert line_of(steps, "all, guidance 2")["steps 60"] == "0.5000"
    rows = read_rows({"masks": masks, "masks seed=1": masks})
    assert [line["precision"] for line in over_seeds(rows, ("precision",))] == ["0.50", "0.70"]


def test_anl_without_guidance_stands_beside_anl_and_costs_no_training(tmp_path):
    def row(guidance, **figures):
        return {"precision": 0.5, "conditions": "held out", "guidance": guidance, **figures}

    trained = {"held-out loss": 0.1, "seconds": 60.0, "peak MB": 900.0}
    key = "data=flowers tune=anl seed=0 steps=500"
    rows = {
        key: row(2.0, **trained),
        f"{key} guidance=1": row(1.0, precision=0.4),
        "data=flowers tune=all seed=0 steps=500": row(2.0, **trained),
        "data=flowers tune=anl seed=0 tokens=2 steps=500": row(2.0, **trained),
        "masks": [row(2.0, rate=0.5), {"conditions": "real", "precision": 0.9}],
    }
    made = report(rows, tmp_path)
    lines = table_lines(section_of(made, "Ways to tune: flowers"))
    assert lines[0][:2] == ["tune", "guidance"]
    assert [line[:2] for line in lines[1:4]] == [["anl", "2.0"], ["anl", "1.0"], ["all", "2.0"]]
    steps = table_lines(section_of(made, "By steps of training: flowers"))
    names = {line[0] for line in steps}
    assert names == {"tune", "anl", "anl, guidance 2.0", "anl, guidance 1.0", "all"}
    assert line_of(section_of(made, "What training costs: flowers"), "anl")["starts"] == "1"
    changed = table_lines(section_of(made, "One thing changed"))
    assert [line[0] for line in changed] == ["changed", "nothing", "tokens=2"]
    curve = table_lines(section_of(made, "Mask rates"))
    assert curve[0] == ["conditions", "rate", "precision"]


def curve(*errors):
    """The figures of a long run with these held-out errors after 50 steps and more."""
    points = [[50 * (i + 1), 0.1, error] for i, error in enumerate(errors)]
    at_step, _, least = min(points, key=lambda point: point[2])
    figures = {"least held-out loss": least, "at step": at_step}
    return {**figures, "last held-out loss": errors[-1], "curve": points}


def test_overfitting_tells_from_where_a_way_to_tune_is_worse_than_anl(tmp_path):
    assert "\n## Overfitting" not in report(small(), tmp_path)
    more = {
        "n=50 tune=anl seed=0": curve(0.5, 0.4, 0.3, 0.3),
        "n=50 tune=all seed=0": curve(0.6, 0.2, 0.4, 0.5),
        "n=50 tune=attention seed=0": curve(0.5, 0.3, 0.2, 0.2),
        "n=1000 tune=all seed=0": curve(0.6, 0.5, 0.4, 0.3),
        "n=1000 tune=anl seed=0": curve(0.5, 0.4, 0.3, 0.2),
        "n=1000 tune=attention seed=0": curve(0.6, 0.5, 0.2, 0.1),
        "n=200 tune=all seed=0": curve(0.6, 0.5),
    }
    results = small(**{f"overfitting {key}": row for key, row in more.items()})
    text = section_of(report(results, tmp_path), "Overfitting")
    head, *lines = table_lines(text)
    names = ["least error, held out", "at step", "error at the end, held out", "worse than anl"]
    assert head == ["n", "tune", *names]
    assert lines[0] == ["50", "anl", "0.3000", "150", "0.3000", ""]
    assert lines[1] == ["50", "all", "0.2000", "100", "0.5000", "from step 150 on"]
    ends = ["", "from step 150 on", "never", "from step 50 on", ""]
    assert [line[-1] for line in lines] == [*ends, "at 2 of 4 steps, but not at the last", ""]
    assert "Runs of 200 steps, by which the learning rate falls to 0" in text and "seed 0" in text

    results["overfitting n=50 tune=all seed=1"] = curve(0.1, 0.1, 0.1, 0.1)
    lines = table_lines(section_of(report(results, tmp_path), "Overfitting"))
    assert lines[0][-2:] == ["seeds", "worse than anl"]
    assert lines[2][-2:] == ["2", "from step 150 on"]  # of the seed that anl has, too
    results["overfitting n=50 tune=anl seed=1"] = curve(0.1, 0.1, 0.1, 0.4)
    lines = table_lines(section_of(report(results, tmp_path), "Overfitting"))
    assert lines[2][-1] == "at 2 of 4 steps, but not at the last"


def test_controls_stand_below_the_ways_to_tune(tmp_path):
    controls = [
        {"conditions": "held out", "rate": 0.0, "precision": 0.5},
        {"conditions": "reconstructions", "precision": 0.9, "right kind": 0.95},
        {"conditions": "real", "precision": 0.96},
    ]
    more = {"masks": controls, "controls data=faces": [{"conditions": "base", "precision": 0.1}]}
    lines = table_lines(section_of(report(small(**more), tmp_path), "Ways to tune: flowers"))
    assert [line[0] for line in lines] == ["tune", "anl", "all", "reconstructions", "real"]

    own = [{"conditions": name, "precision": 0.7} for name in ("base", "copies", "real")]
    for row in own:
        row["machine"] = "a third machine"
    more["controls data=flowers"] = own
    text = section_of(report(small(**more), tmp_path), "Ways to tune: flowers")
    names = [line[0] for line in table_lines(text)]
    assert names == ["tune", "anl", "all", "base", "copies", "real", "reconstructions"]
    assert line_of(text, "real")["precision"] == "0.70"  # not the mask curve's
    assert "copies (the training pictures nearest to each condition)" in text
    assert "a third machine" in text


def test_rows_of_a_kind_that_no_table_asks_for_come_as_they_are(tmp_path):
    new = {"drift data=flowers seed=0": {"answer": 42}, "bending": [{"x": 1}, {"x": 2}], "hours": 7}
    made = report(small(**new), tmp_path)
    assert line_of(section_of(made, "drift"), "flowers")["answer"] == "42"
    assert table_lines(section_of(made, "bending")) == [["x"], ["1"], ["2"]]
    assert table_lines(section_of(made, "hours")) == [["value"], ["7"]]
    alone = {"data=flowers tune=anl seed=0 steps=60": {}, "data=flowers tune=all steps=9": {}}
    assert "After 60 steps" in report(alone, tmp_path)


def test_what_is_not_there_has_no_table(tmp_path):
    made = report(small(), tmp_path)
    assert not {"Words", "Mask rates", "Learning rates"} & set(re.findall("## (.*)", made))
    assert "Semi" not in made and "conclude" not in made
    with pytest.raises(ValueError, match="no results yet"):
        report({"setup": {}}, tmp_path)


def test_learners_without_means_are_shown_too(tmp_path):
    row = {"labels a kind": 4, "learned from": "labelled only", "accuracy": 0.5, "spread": 0.1}
    other = {"chosen": "mask rate", "value": 0.3}
    flowers = [{**row, "seeds": 5}, other]
    learners = {"semi-supervised": flowers, "semi-supervised data=faces": [row]}
    made = report(small(**learners), tmp_path)
    flowers = section_of(made, "Semi-supervised learning")
    assert line_of(flowers, "labelled only")["labels a kind: 4"] == "50 ± 10 %"
    assert "Seeds of each: 5." in flowers and ["mask rate", "0.3"] in table_lines(flowers)
    assert "Semi-supervised learning data=faces" in made


def test_the_command_writes_it_beside_its_source_and_names_what_is_missing(tmp_path, capsys):
    assert "run the suite into" in one_line(main, [tmp_path, "--report"], capsys)
    (tmp_path / "results.json").write_text(json.dumps(small()))
    main([str(tmp_path), "--report"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "results.md")]
    assert (tmp_path / "results.md").read_text() == report(small(), tmp_path)
    assert write_report(tmp_path) == tmp_path / "results.md"


def test_every_table_has_a_maker_and_every_row_a_table(results):
    rows = read_rows(results)
    shown_rows = [row for make in module.TABLES for section in make(rows) for row in section.rows]
    left = {row.kind for row in rows} - {row.kind for row in shown_rows}
    assert not left
