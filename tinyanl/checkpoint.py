"""Reads a checkpoint as data: any released container, and nothing that a file says is run.

A checkpoint is a pickle, and a pickle is a program: it may name any function and have it called.
Here every name in it becomes an inert record, so a Lightning .ckpt needs no Lightning, OpenAI's
CLIP no TorchScript, and a hostile file finds nothing to call.

Copy this file alone: it needs torch, nothing else of tinyanl. Usage:

    import torch
    from checkpoint import load_checkpoint
    toy = {f"encoder.{k}.weight": torch.zeros(8, 3, 3, 3) for k in ("conv_in", "down.0", "down.1")}
    torch.save({"state_dict": toy, "epoch": 3}, "toy.ckpt")
    print(load_checkpoint("toy.ckpt").keys())          # or a released model.ckpt, ViT-B-32.pt ...
"""
import functools
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

FID = "inception-2015-12-05-6726825d.pth"
SIZES = {  # bytes, of files whose size was published
    "bpe_simple_vocab_16e6.txt.gz": 1_356_917,
    f"pt_{FID}": 95_628_359,
    f"weights-{FID}": 95_628_359,
}
DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.DoubleStorage": torch.float64,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
# A module in TorchScript's code: its name, and the lists of its parameters and buffers.
TORCHSCRIPT_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n((?:  __\w+__ = \[.*\]\n)*)", re.MULTILINE
)
# Where training scripts keep the state dict, if it is not at the top.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


# Why reading is safe: unpickling calls only what find_class returns, and that is a fresh subclass
# of Inert, whatever the name: nothing is imported, no real function or class is in reach, torch's
# own included. to_tensor then builds tensors from these records and checks every number against the
# bytes that the file really holds. TorchScript's code is never compiled, only searched for the
# names of parameters and buffers.
#
# torch.load with a pickle_module of our own would not be shorter: it gives a TorchScript archive to
# torch.jit.load, which compiles it, so all of this would still be needed beside it.
class Inert(dict):
    """Stands for anything a pickle names: it takes any arguments, items and state, and does nothing
    with them."""

    name = ""
    args = ()
    __hash__ = object.__hash__

    def __init__(self, *args, **kwargs):
        self.args = args

    def __call__(self, *args, **kwargs):
        return self

    def __setstate__(self, state):  # a TorchScript module arrives as its attributes
        if isinstance(state, dict):
            self.update(state)

    def append(self, item):
        """Items of what the pickle takes for a list or a set are not needed."""

    extend = add = append


class Unpickler(pickle._Unpickler):
    """Python's own unpickler: C's fills gigabytes where a file names memo 4,000,000,000."""

    def persistent_load(self, pid):
        return pid

    def find_class(self, module: str, name: str) -> type:
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})


def is_tensor(value: object) -> bool:
    """Whether it is a tensor, or the record of one."""
    return isinstance(value, Tensor) or (isinstance(value, Inert) and "._rebuild_" in value.name)


def to_tensor(record: Tensor | Inert, read: Callable[[str], Tensor]) -> Tensor:
    """The tensor that a record describes. read(key) gives a storage, (bytes,) uint8. ValueError: no
    released file has such a record, or it reaches beyond its storage."""
    if isinstance(record, Tensor):
        return record
    if record.name == "torch._utils._rebuild_parameter":
        return to_tensor(record.args[0], read)
    (_, kind, key, *_), offset, size, stride = record.args[:4]
    if record.name != "torch._utils._rebuild_tensor_v2" or kind.name not in DTYPES:
        raise ValueError(f"a tensor is stored by {record.name} as {kind.name}, which no released "
                         "file does")
    flat = read(key).view(DTYPES[kind.name])
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    is_negative = min(offset, *size, *stride, 0) < 0
    is_beyond = count > len(flat) or (count > 0 and last >= len(flat))
    if is_negative or is_beyond:
        raise ValueError(f"a tensor of size {size}, stride {stride}, offset {offset} in "
                         f"{len(flat)} numbers")
    return flat.as_strided(size, stride, offset)


def refuse_bomb(path: Path) -> None:
    """ValueError for a zip archive that unpacks to far more than its size: checkpoints are stored,
    not compressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > 2 * size + (1 << 20):
        raise ValueError(f"{path} ({size:,} bytes) would unpack to {unpacked:,}: no checkpoint "
                         "does, do not use it")


def read_zip(path: Path) -> dict[str, Tensor]:
    """torch.save since 1.6, and TorchScript: a zip archive of one pickle and one entry per
    storage."""
    refuse_bomb(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if not pickles:
            raise ValueError(f"{path} is a zip file of {names[:5]}, no checkpoint: unzip it first")
        root = pickles[0].removesuffix("data.pkl")

        @functools.cache  # tied tensors stay tied
        def read(key: str) -> Tensor:
            data = bytearray(archive.read(f"{root}data/{key}"))
            if not data:
                return torch.empty(0, dtype=torch.uint8)
            return torch.frombuffer(data, dtype=torch.uint8)

        top = Unpickler(archive.open(pickles[0])).load()
        if getattr(top, "name", "").startswith("__torch__."):
            top = flatten_module(top, torchscript_lists(archive, root))
        return state_dict(path, top, read)


def torchscript_lists(archive: zipfile.ZipFile, root: str) -> dict[str, list[str]]:
    """The names of parameters and buffers of every class in TorchScript's code."""
    lists = {}
    for name in archive.namelist():
        if not name.startswith(f"{root}code/") or not name.endswith(".py"):
            continue
        module = name.removeprefix(f"{root}code/").removesuffix(".py").replace("/", ".")
        for class_name, lines in TORCHSCRIPT_CLASS.findall(archive.read(name).decode()):
            lists[f"{module}.{class_name}"] = re.findall(r'"([^"]+)"', lines)
    return lists


def flatten_module(module: Inert, lists: dict[str, list[str]], prefix: str = "") -> dict:
    """The state dict of a TorchScript module: its parameters and buffers, and its children's."""
    state = {}
    for name, value in module.items():
        if is_tensor(value) and name in lists[module.name]:
            state[prefix + name] = value
    for name, value in module.items():
        if isinstance(value, Inert) and value.name in lists:
            state |= flatten_module(value, lists, f"{prefix}{name}.")
    return state


def state_dict(path: Path, top: object, read: Callable | None = None) -> dict[str, Tensor]:
    """The tensors of what was unpickled: under Lightning's "state_dict" or its like, or at the
    top."""
    state = top if isinstance(top, dict) else {}
    if "trained" in state:
        raise ValueError(f"{path} is a tinyanl adapter, no base: give its run folder to "
                         "`sample --run`")
    for name in WRAPPERS:
        inside = state.get(name)
        if isinstance(inside, dict) and any(map(is_tensor, inside.values())):
            state = inside
            break
    if not any(map(is_tensor, state.values())):
        raise ValueError(f"{path} holds no tensors at its top or under 'state_dict', only "
                         f"{[*state][:5]}: give a file that holds a model's state_dict()")
    state = {str(k): to_tensor(v, read) for k, v in state.items() if is_tensor(v)}
    described = sum(tensor.nbytes for tensor in state.values())
    size = path.stat().st_size
    if described > 2 * size + (1 << 20):
        raise ValueError(f"{path} ({size:,} bytes) describes tensors of {described:,}: do not use "
                         "it")
    return state


def unreadable(path: Path, why: str) -> ValueError:
    """The error for a file that should be downloaded again."""
    size = f"{path.stat().st_size:,}"
    if path.name in SIZES:
        size += f" of {SIZES[path.name]:,}"
    return ValueError(f"{path} ({size} bytes) {why}: download it again (links: "
                      "python -m tinyanl.weights)")


def missing(path: Path) -> FileNotFoundError:
    """The error for a path that is no file: it lists what is there instead."""
    folder = path if path.is_dir() else path.parent
    inside = "nothing: no such folder"
    if folder.is_dir():
        inside = sorted(entry.name for entry in folder.iterdir())[:20]
    return FileNotFoundError(f"no file {path}, give one that exists; {folder} holds {inside}")


def what_else(head: bytes) -> str:
    """What a file is that is no checkpoint, by how it begins."""
    start = head.lstrip()
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: `git lfs pull`, or else"
    if start.startswith(b"<"):
        return "is a web page saved as a file"
    if start.startswith(b"\x1f\x8b"):
        return "is gzipped, no checkpoint"
    if not head:
        return "is empty"
    return f"is no checkpoint, it starts with {head[:16]!r}: move it elsewhere, or else"


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor in the file's own dtype, from any released container: torch.save's two
    formats, Lightning, TorchScript, safetensors. No code from the file runs.

    FileNotFoundError: no such file. ValueError: what is wrong with it, and what to do."""
    path = Path(path)
    if not path.is_file():
        raise missing(path)
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        if head.startswith(b"PK"):
            return read_zip(path)
        if head.startswith(b"\x80"):  # torch.save before 1.6: torch's own restricted reader
            return state_dict(path, torch.load(path, map_location="cpu", weights_only=True))
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e9:
            from safetensors.torch import load_file
            return load_file(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a .safetensors file: python -m pip install "
                         "safetensors") from error
    except Exception as error:  # whatever a damaged or hostile file sets off
        if str(error).startswith(str(path)):
            raise
        raise unreadable(path, f"is cut off, damaged or unsafe ({error!r:.200})") from error
    raise unreadable(path, what_else(head))
