"""README and the pages it leads to: what they say stands in results.md, and links are right."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from commands import section_of, table_lines

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tutorials/results.md").read_text()
NUMBER = r"\d+(?:[.,]\d+)*"
FIGURE = re.compile(rf"{NUMBER}(?: ± {NUMBER})?(?: %)?")


def test_every_figure_of_what_was_found_stands_in_a_table():
    found = section_of(README, "What we found").split("\n- ", 1)[1]
    cells = {cell for line in table_lines(RESULTS) for cell in line}
    cells |= {figure for cell in cells for figure in FIGURE.findall(cell)}
    cells |= {figure.removesuffix(" %") for figure in cells}
    assert found.count("**Held:**") == 3 and found.count("**Did not hold:**") == 2
    figures = FIGURE.findall(found)
    assert len(figures) >= 10
    for figure in figures:
        assert figure in cells, f"{figure} stands in no table of results.md"


def test_the_time_of_the_first_command_stands_in_results_md():
    times = re.findall(r"(\d+) minutes", README)
    line = table_lines(section_of(RESULTS, "First command"))
    column = line[0].index("minutes")
    assert times and set(times) <= {cells[column] for cells in line[1:]}


PAGES = ["README.md", "tinyanl/README.md", "tutorials/README.md", "tutorials/results.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_into_a_page_find_their_heading(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]*)\)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target if target else ROOT / page
        headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}
        assert anchor in slugs, f"{target}#{anchor}"


def commands_of(page: str) -> list[list[str]]:
    """The words behind `python -m tinyanl.` of every command that stands in the blocks of code."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    commands = []
    for line in "".join(blocks).splitlines():
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            if word.startswith("tinyanl."):
                rest = words[i:]
                commands.append(rest[: rest.index("&&")] if "&&" in rest else rest)
    return commands


@pytest.mark.parametrize("page", PAGES[:2])
def test_commands_exist_and_know_the_flags_they_are_given(page, capsys):
    commands = commands_of(page)
    assert len(commands) >= 6
    for module, *words in commands:
        if module == "tinyanl.pretrain":
            module = "tinyanl.pretrain.__main__"
        what = [word for word in words[:1] if word.isalpha()]  # get, families
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(module).main([*what, "--help"])
        said = capsys.readouterr().out
        assert stop.value.code == 0
        for flag in re.findall(r"--[\w-]+", " ".join(words)):
            assert f"{flag} " in said or f"{flag}\n" in said, f"{module} {flag}"


def test_every_chapter_and_every_file_is_listed():
    for chapter in (ROOT / "tutorials").glob("*.ipynb"):
        assert f"](tutorials/{chapter.name})" in README, chapter.name
    files = (ROOT / "tinyanl/README.md").read_text()
    listed = ("__init__.py", "emoji.py", "merges.py", "linear.py", "training.py", "families.py")
    for path in (ROOT / "tinyanl").rglob("*.py"):
        if path.name not in listed:
            assert f"]({path.relative_to(ROOT / 'tinyanl').as_posix()})" in files, path.name


def test_both_tables_of_chapters_say_the_same_minutes():
    chapters = (ROOT / "tutorials/README.md").read_text()
    there = {line[0]: line[1] for line in table_lines(chapters) if ".ipynb" in line[0]}
    here = {line[0]: line[2] for line in table_lines(README) if ".ipynb" in line[0]}
    assert {name.replace("(tutorials/", "("): minutes for name, minutes in here.items()} == there
