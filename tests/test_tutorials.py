"""The notebooks as they are committed: outputs, sizes, links and cells. .ci/run executes them."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
BY_HAND = re.compile("by[ _]hand")  # so says a cell that builds the heart of a chapter
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
        assert not taken, f"call a class by hand My{taken.pop()}: the package has that name"
    builds = any(BY_HAND.search(source) for source in cells(path, "code"))
    assert builds or path.stem.endswith("real_weights")


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, ROOT / "tutorials/README.md", ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_are_right(path):
    text = "\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    if path.suffix == ".ipynb":
        assert "<details>" in text and "What you now know:" in text and "**Copy:**" in text
