"""The notebooks as they are committed: outputs, sizes, links and cells. .ci/run executes them."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
BY_HAND = re.compile(
    "by[ _]hand"
)  # a cell that says so may be longer: it builds the heart of a chapter


def cells(path: Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == kind
    ]


def test_there_are_ten():
    assert [path.name[:3] for path in NOTEBOOKS] == [f"{i:02d}_" for i in range(1, 11)]


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
        assert len(lines) <= (24 if BY_HAND.search(source) else 20), lines[0]
        assert max(map(len, lines)) <= 110, max(lines, key=len)
        defined = {
            node.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }  # which also refuses magics
        assert not defined & package, defined & package
    assert any(map(BY_HAND.search, cells(path, "code"))) or path.name.startswith("10")


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, ROOT / "tutorials/README.md", ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_are_right(path):
    text = "\n".join(cells(path, "markdown")) if path.suffix == ".ipynb" else path.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or (path.parent / target).exists(), target
    if path.suffix == ".ipynb":
        assert "<details>" in text and "What you now know:" in text and "**Copy:**" in text
