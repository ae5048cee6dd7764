"""The shape of the package: every leaf stands alone and runs its own header, and imports point one
way."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tinyanl

PACKAGE = Path(tinyanl.__file__).parent
LEAVES = ["schedule", "autoencoder", "unet", "clip", "tokenizer", "anl", "masking", "checkpoint"]
LEAVES += ["data", "metrics", "flowers", "table", "layouts", "download"]
# Each of these may import what stands before it, and every leaf.
MIDDLE = ["options", "page", "runs", "identify", "weights", "tune", "models", "encode", "sample"]
MIDDLE += ["dataset", "loss", "train"]
MIDDLE += ["experiments.judge", "evaluate", "augment"]
EXPERIMENTS = ["experiments.semi_supervised", "experiments.report", "experiments.controls"]
EXPERIMENTS += ["experiments.suite", "experiments.benchmark"]
PRETRAIN = ["pretrain.emoji", "pretrain.merges", "pretrain.linear", "pretrain.art"]
PRETRAIN += ["pretrain.training", "pretrain.families", "pretrain.clip", "pretrain.autoencoder"]
PRETRAIN += ["pretrain.unet", "pretrain.__main__"]
ORDER = [*MIDDLE, *EXPERIMENTS, *PRETRAIN]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
ALLOWED = {"torch", "torchvision", "einops", "ftfy", "regex", "tqdm", "PIL"}
ALLOWED |= sys.stdlib_module_names


def imports(module):
    """(names of other packages, names of tinyanl's own modules) that a file imports."""
    outside, inside = set(), set()
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            own_package = module.rpartition(".")[0] if node.level == 1 else ""
            inside.add(f"{own_package}.{node.module}".removeprefix("."))
        elif isinstance(node, ast.ImportFrom):
            outside.add(node.module.split(".")[0])
    return outside, inside


# Run by `python -I`, so that no PYTHONPATH counts. Each folder of its arguments holds a leaf and
# the lines of its header; these run in a child of their own, in that folder, which comes first as
# for a script that lies in it. What takes long to import is imported once, before: every child has
# it then.
RUN_EACH = """
import os, sys
import einops, ftfy, regex, torch, torchvision, tqdm
torch.set_num_threads(1)  # a process with more threads cannot be forked
sys.modules["tinyanl"] = None  # an installed package is out of reach
try:
    import tinyanl
    sys.exit("tinyanl can be imported, so nothing here would show that a leaf stands alone")
except ImportError:
    pass
for folder in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        for number, name in ((1, "out.txt"), (2, "error.txt")):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        exec(compile(open("usage.txt").read(), "usage", "exec"), {"__name__": "usage"})
        sys.stdout.flush()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(os.path.join(folder, "code.txt"), "w").write(str(code))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Leaf -> a folder with a copy of it alone, in which the lines of its header have been run."""
    folders = {}
    for leaf in LEAVES:
        folders[leaf] = tmp_path_factory.mktemp(leaf)
        source = (PACKAGE / f"{leaf}.py").read_text()
        (folders[leaf] / f"{leaf}.py").write_text(source)
        usage = ast.get_docstring(ast.parse(source), clean=True).split("Usage:\n", 1)[1]
        (folders[leaf] / "usage.txt").write_text(textwrap.dedent(usage))
    done = subprocess.run([sys.executable, "-I", "-c", RUN_EACH, *map(str, folders.values())],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_copied_alone_runs_the_lines_of_its_header(leaf, folders):
    usage, code, out, error = (
        (folders[leaf] / f"{name}.txt").read_text() for name in ("usage", "code", "out", "error")
    )
    assert f"from {leaf} import" in usage
    assert code == "0" and out, error


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way_and_name_only_run_time_packages(module):
    outside, inside = imports(module)
    extra = {
        "checkpoint": {"safetensors"},
        "data": {"pillow_heif"},
        "experiments.benchmark": {"diffusers"},
    }  # where they are needed
    assert outside - extra.get(module, set()) <= ALLOWED
    if module in LEAVES:
        assert not inside
    else:
        assert inside <= {*LEAVES, *ORDER[: ORDER.index(module)]}
