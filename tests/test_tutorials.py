"""The notebooks as they are committed: outputs, sizes, links, cells and exercises. .ci/run executes
them with chapters.py, which is tested here, too."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from chapters import exercises, is_stale, run, solved
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
BY_HAND = re.compile("by[ _]hand")  # so says a cell that builds the heart of a chapter
PAGES = ["README.md", "weights.md", "tinyanl/README.md"]
PAGES += ["tutorials/README.md", "tutorials/results.md"]
LINES = 24  # of any other cell; what is built by hand takes as many as it reads best in


def cells(path: Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


def test_chapters_are_numbered_without_a_gap():
    numbers = [path.name[:3] for path in NOTEBOOKS]
    assert numbers == [f"{i:02d}_" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 10


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_saved_whole_and_small(path):
    code = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(
        range(1, len(code) + 1)
    )  # run once, from the top
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and not any(
        o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs
    )
    assert path.stat().st_size < 1_500_000
    assert not re.search(
        r"/(home|root|work|Users|tmp|usr)/", re.sub(r'"image/png": "[^"]*"', "", path.read_text())
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_redefine_nothing(path):
    package = {
        node.name
        for file in (ROOT / "tinyanl").rglob("*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    for source in cells(path, "code"):
        lines = source.splitlines()
        assert len(lines) <= LINES or BY_HAND.search(source), lines[0]
        assert max(map(len, lines)) <= 110, max(lines, key=len)
        defined = {
            node.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }  # which also refuses magics
        taken = defined & package
        assert not taken, f"the package has {taken}: call yours My..."
    builds = any(BY_HAND.search(source) for source in cells(path, "code"))
    assert builds or path.stem.endswith("real_weights")


@pytest.mark.parametrize(
    "path",
    [*NOTEBOOKS, *(ROOT / page for page in PAGES)],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_are_right(path):
    text = "\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        assert target.startswith("http") or (path.parent / target).exists(), target
    if path.suffix == ".ipynb":
        assert "<details>" in text and "What you now know:" in text and "**Copy:**" in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_have_an_assert_and_an_answer(path):
    for source in cells(path, "markdown"):
        for starter, answer in exercises(source):
            assert "assert" in starter and "..." in starter, starter
            assert answer and "..." not in answer, starter
            ast.parse(solved(starter, answer))


@pytest.mark.parametrize(
    "saved, fresh",
    [
        ("loss 0.0831", "loss 0.0910"),  # a number
        ("8 of 9 right", "9 of 9 right"),  # a count
        ("(8, 3, 64, 64)", "(8, 4, 64, 64)"),  # a shape
        ("1,234 pictures", "1,334 pictures"),
        ("rate 0.5 of 2", "rate 0.5 of -2"),
        ("a red rosette", "a red daisy"),  # a word
        ("", "a line more"),
        ("sha 2b33f77", "sha 2b34f77"),  # digits inside a word
        ("<Figure size 800x160 with 1 Axes>", "<Figure size 900x160 with 1 Axes>"),
        ("nan", "0.5"),
    ],
)
def test_a_stale_output_is_caught(saved, fresh):
    assert is_stale("print()", saved, fresh)
    assert is_stale("print()", fresh, saved)


@pytest.mark.parametrize(
    "saved, fresh",
    [
        ("loss 0.0831, 97.3%", "loss 0.0832, 97.2%"),  # the last decimal
        ("FD 1,234", "FD 1,240"),  # within 2 %
        ("error 1.8e-05", "error 9.9e-06"),  # of rounding
        ("mean  9.99 |", "mean 10.01 |"),  # which needs a column less
    ],
)
def test_rounding_is_not_called_stale(saved, fresh):
    assert not is_stale("print()", saved, fresh)
    assert not is_stale("print()", fresh, saved)


def test_a_comment_says_what_may_differ():
    numbers, words = ("loss 0.08", "loss 0.12"), ("a red rosette", "a red daisy")
    assert not is_stale("x = 1\n# numbers vary: trained here\nprint(x)", *numbers)
    assert is_stale("x = 1\n# numbers vary: trained here\nprint(x)", *words)
    assert not is_stale("# output varies: it names a device\nprint(x)", *words)
    assert is_stale("# output varies:\nprint(x)", *words)  # without a reason
    assert is_stale("print('# output varies: no')", *words)  # that is no comment


def test_a_chapter_is_run_compared_and_its_exercise_solved(tmp_path):
    def written(saved: str, answer: str) -> Path:
        code = nbformat.v4.new_code_cell("a = 3\nprint(a)")
        code["outputs"] = [nbformat.v4.new_output("stream", name="stdout", text=saved)]
        text = (
            "**Exercise.** Square it.\n"
            "```python\ndef square(x):\n    ...\n\nassert square(a) == 9\n```\n"
            f"<details>\n\n```python\n{answer}\n```\n</details>"
        )
        book = nbformat.v4.new_notebook(cells=[code, nbformat.v4.new_markdown_cell(text)])
        nbformat.write(book, tmp_path / "book.ipynb")
        return tmp_path / "book.ipynb"

    right = "def square(x):\n    return x * x"
    assert run(written("3\n", right)) == []
    (stale,) = run(written("4\n", right))
    assert "cell 0, 'a = 3'\n--- saved\n4\n\n--- now\n3\n" in stale
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run(written("3\n", "def square(x):\n    return x + x"))


def test_chapters_open_on_colab_where_the_repository_has_an_address():
    project = (ROOT / "pyproject.toml").read_text()
    address = re.search(r"https://github\.com/([\w.-]+/[\w.-]+)", project)
    if not address:
        pytest.skip("pyproject.toml names no repository on GitHub")
    for path in NOTEBOOKS:
        page = f"https://colab.research.google.com/github/{address[1]}/blob/main/tutorials/{path.name}"
        assert page in cells(path, "markdown")[0], path.name
        assert "pip install" in cells(path, "code")[0], path.name
