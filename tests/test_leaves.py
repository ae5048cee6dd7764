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
EXPERIMENTS = ["experiments.semi_supervised", "experiments.suite", "experiments.benchmark"]
PRETRAIN = ["pretrain.emoji", "pretrain.merges", "pretrain.codes", "pretrain.art"]
PRETRAIN += ["pretrain.training", "pretrain.families", "pretrain.clip", "pretrain.autoencoder"]
PRETRAIN += ["pretrain.unet", "pretrain.__main__"]
ORDER = [*MIDDLE, *EXPERIMENTS, *PRETRAIN]
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)
ALLOWED = {
    "torch",
    "torchvision",
    "einops",
    "ftfy",
    "regex",
    "tqdm",
    "PIL",
} | sys.stdlib_module_names


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


@pytest.mark.parametrize("leaf", [leaf for leaf in LEAVES if leaf in MODULES])
def test_a_leaf_copied_alone_runs_the_lines_of_its_header(leaf, tmp_path):
    source = (PACKAGE / f"{leaf}.py").read_text()
    (tmp_path / f"{leaf}.py").write_text(source)
    usage = textwrap.dedent(
        ast.get_docstring(ast.parse(source), clean=True).split("Usage:\n", 1)[1]
    )
    assert f"from {leaf} import" in usage
    # -I: no PYTHONPATH. The folder comes first, as for a script that lies in it; an installed
    # package is out of reach.
    code = f"""import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.modules["tinyanl"] = None
try:
    import tinyanl
    sys.exit("tinyanl can be imported, so nothing here would show that the leaf stands alone")
except ImportError:
    pass
{usage}"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr


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
