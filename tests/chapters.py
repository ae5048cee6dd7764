"""Runs chapters from the top and says which of their saved outputs are stale.

    python tests/chapters.py tutorials/*.ipynb

What a cell printed when it was saved is compared with what it prints now: every word, and every
number to within TOLERANCE, since CPUs round differently. Pictures and standard error (progress
bars) are not compared. Two comments in a cell, which its readers see as well, ask for less:

    # numbers vary: trained here            words are compared, numbers are not
    # output varies: times of a machine     nothing is compared

Then every exercise that has starter code is solved with its hidden answer, in the same kernel, so
that its assert is known to hold.
"""
import ast
import copy
import math
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TOLERANCE = 0.02  # of the number; or one in its last decimal place; or SMALLEST
SMALLEST = 1e-4  # errors of rounding are below, which nobody needs to reproduce
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)")
VARIES = re.compile(r"^ *# (numbers vary|output varies): \w", re.MULTILINE)
CODE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def printed(cell) -> str:
    """All text that a cell has put out, but for standard error."""
    parts = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stdout":
            parts.append(output["text"])
        elif "data" in output:
            parts.append(output["data"].get("text/plain", "") + "\n")
    return "".join(parts)


def is_close(saved: str, fresh: str) -> bool:
    """Whether two numbers, as they were printed, differ by no more than rounding explains."""
    decimals = re.search(r"\.(\d+)", saved)
    last_place = 10.0 ** -len(decimals[1]) if decimals and "e" not in saved else 0
    a, b = (float(number.replace(",", "")) for number in (saved, fresh))
    least = max(SMALLEST, 1.001 * last_place)
    return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=least)


def is_stale(source: str, saved: str, fresh: str) -> bool:
    """Whether a cell of this source prints something else now than it did when it was saved."""
    varies = VARIES.search(source)
    if varies and varies[1] == "output varies":
        return False
    if NUMBER.sub("0", saved).split() != NUMBER.sub("0", fresh).split():
        return True
    if varies:
        return False
    pairs = zip(NUMBER.findall(saved), NUMBER.findall(fresh), strict=True)
    return not all(is_close(a, b) for a, b in pairs)


def stale_outputs(saved, fresh) -> list[str]:
    """For each stale output of a notebook: its cell, what was saved, what is printed now."""
    found = []
    for number, (old, new) in enumerate(zip(saved["cells"], fresh["cells"], strict=False)):
        if old["cell_type"] != "code":
            continue
        before, now = printed(old), printed(new)
        if is_stale(old["source"], before, now):
            first = old["source"].splitlines()[0]
            found.append(f"cell {number}, {first!r}\n--- saved\n{before}\n--- now\n{now}")
    return found


def exercises(markdown: str) -> list[tuple[str, str]]:
    """The starter code and the hidden answer of each exercise in a cell that has any code. Several
    pieces of code count as one."""
    found = []
    for exercise in markdown.split("**Exercise")[1:]:
        starter, _, answer = exercise.partition("<details>")
        if CODE.search(starter):
            found.append(("".join(CODE.findall(starter)), "".join(CODE.findall(answer))))
    return found


def solved(starter: str, answer: str) -> str:
    """The starter code with the answer in place of what it leaves open with `...`."""
    parts = []
    for statement in ast.parse(starter).body:
        is_open = any(
            isinstance(node, ast.Constant) and node.value is Ellipsis
            for node in ast.walk(statement)
        )
        if not is_open:
            parts.append(ast.unparse(statement))
        elif answer not in parts:
            parts.append(answer)
    return "\n".join(parts)


def run(path: Path) -> list[str]:
    """Execute a notebook, then its exercises with their answers -> its stale outputs.

    CellExecutionError: a cell or an answer fails."""
    saved = nbformat.read(path, as_version=4)
    fresh = copy.deepcopy(saved)
    for cell in saved["cells"]:
        if cell["cell_type"] == "markdown":
            for starter, answer in exercises(cell["source"]):
                fresh["cells"].append(nbformat.v4.new_code_cell(solved(starter, answer)))
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(fresh, timeout=None, resources=folder).execute()
    return stale_outputs(saved, fresh)


def main(paths: list[str]) -> int:
    """Run chapters. Returns how many outputs are stale."""
    total = 0
    for path in map(Path, paths):
        start = time.perf_counter()
        found = run(path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s, {len(found)} stale", flush=True)
        print(*found, sep="\n", end="\n" if found else "", flush=True)
        total += len(found)
    return total


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
