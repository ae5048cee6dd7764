"""The shape of the package: every leaf stands alone and runs its own header, and imports point one way."""
import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tinyanl

PACKAGE = Path(tinyanl.__file__).parent
LEAVES = "schedule autoencoder unet clip tokenizer anl masking checkpoint data metrics flowers".split()
CLIS = "sample judge evaluate augment semi_supervised suite loss train pretrain benchmark".split()
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
ALLOWED = {"torch", "torchvision", "einops", "ftfy", "regex", "tqdm", "PIL"} | sys.stdlib_module_names


def imports(module):
    """(names of other packages, names of tinyanl's own modules) that a file imports."""
    outside, inside = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            inside.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
    return outside, inside


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf in MODULES])
def test_a_leaf_copied_alone_runs_the_lines_of_its_header(leaf, tmp_path):
    source = (PACKAGE / f"{leaf}.py").read_text()
    (tmp_path / f"{leaf}.py").write_text(source)
    usage = textwrap.dedent(ast.get_docstring(ast.parse(source), clean=True).split("Usage:\n", 1)[1])
    assert f"from {leaf} import" in usage
    # -I: no PYTHONPATH. The folder comes first, as for a script that lies in it; an installed package is out of reach
    code = f"""import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules["tinyanl"] = None
try:
    import tinyanl
    sys.exit("tinyanl can be imported, so nothing here would show that the leaf stands alone")
except ImportError:
    pass
{usage}"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way_and_name_only_run_time_packages(module):
    outside, inside = imports(module)
    extra = {"checkpoint": {"safetensors"}, "benchmark": {"diffusers"}}  # where they are needed
    assert outside - extra.get(module, set()) <= ALLOWED
    middle = {"weights": {"checkpoint"}, "runs": {"checkpoint"}, "tune": {"anl", "unet"},
              "models": {*LEAVES, "weights", "runs", "tune"}, "encode": {*LEAVES, "runs", "models"}, "art": {"data"}}
    below = middle | {leaf: set() for leaf in LEAVES}
    below |= {cli: {*LEAVES, *middle, *CLIS[:i]} for i, cli in enumerate(CLIS)}
    assert module in below and inside <= below[module]


def test_files_are_short_enough_to_read():
    lines = {module: (PACKAGE / f"{module}.py").read_text().splitlines() for module in MODULES}
    assert sum(map(len, lines.values())) < 4_150
    assert not [f"{m}:{i}" for m, text in lines.items() for i, line in enumerate(text, 1) if len(line) > 120]
