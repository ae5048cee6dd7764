"""Reads a checkpoint as data: any released container, and nothing that a file says is run.

A checkpoint is a pickle, and a pickle is a program: it may name any function and have it called. Here every name in it
becomes an inert record, so a Lightning .ckpt needs no Lightning, OpenAI's CLIP no TorchScript, and a hostile file finds
nothing to call.

Copy this file alone: it needs torch, nothing else of tinyanl. Usage:

    import torch
    from checkpoint import load_checkpoint
    toy = {f"encoder.{k}.weight": torch.zeros(8, 3, 3, 3) for k in ("conv_in", "down.0", "down.1")}
    torch.save({"state_dict": toy, "epoch": 3}, "toy.ckpt")
    print(load_checkpoint("toy.ckpt").keys())            # or a released model.ckpt, ViT-B-32.pt ...
"""
import functools
import math
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

FID = "inception-2015-12-05-6726825d.pth"
SIZES = {"bpe_simple_vocab_16e6.txt.gz": 1_356_917,
         f"pt_{FID}": 95_628_359, f"weights-{FID}": 95_628_359}  # bytes, of files whose size was published

# Why reading is safe: unpickling calls only what find_class returns, and that is a fresh subclass of _Inert,
# whatever the name: nothing is imported, no real function or class is in reach, torch's own included. _tensor
# then builds tensors from these records and checks every number against the bytes that the file really holds.
# TorchScript code is never compiled, only searched for two lists of names.
class _Inert(dict):
    """Stands for anything a pickle names: takes any arguments, items and state, and does nothing with them."""
    name, args, __hash__ = "", (), object.__hash__
    append = extend = add = lambda self, item: None
    __call__ = lambda self, *args, **kwargs: self

    def __init__(self, *args, **kwargs):
        self.args = args

    def __setstate__(self, state):  # a TorchScript module arrives as its attributes
        self.update(state if isinstance(state, dict) else {})


class _Unpickler(pickle._Unpickler):  # the one in Python: C's fills gigabytes where a file names memo 4,000,000,000
    persistent_load = lambda self, pid: pid

    def find_class(self, module: str, name: str) -> type:
        return type("_Inert", (_Inert,), {"name": f"{module}.{name}"})


_DTYPES = {f"torch.{name}Storage": dtype for name, dtype in dict(
    Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Double=torch.float64, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool).items()}
_is_tensor = lambda x: isinstance(x, Tensor) or isinstance(x, _Inert) and "._rebuild_" in x.name


def _tensor(x: Tensor | _Inert, read) -> Tensor:
    """The tensor that a record describes; read(key) gives a storage, (bytes,) uint8."""
    if isinstance(x, Tensor):
        return x
    if x.name == "torch._utils._rebuild_parameter":
        return _tensor(x.args[0], read)
    (_, kind, key, *_), offset, size, stride = x.args[:4]
    if x.name != "torch._utils._rebuild_tensor_v2" or kind.name not in _DTYPES:
        raise ValueError(f"a tensor is stored by {x.name} as {kind.name}, which no released file does")
    flat, count = read(key).view(_DTYPES[kind.name]), math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min(offset, *size, *stride, 0) < 0 or count > len(flat) or count and last >= len(flat):
        raise ValueError(f"a tensor of size {size}, stride {stride}, offset {offset} in {len(flat)} numbers")
    return flat.as_strided(size, stride, offset)


def refuse_bomb(path: Path) -> None:
    """ValueError for a zip archive that unpacks to far more than its size: checkpoints are stored, not compressed."""
    with zipfile.ZipFile(path) as archive:
        unpacked, size = sum(entry.file_size for entry in archive.infolist()), path.stat().st_size
    if unpacked > 2 * size + (1 << 20):
        raise ValueError(f"{path} ({size:,} bytes) would unpack to {unpacked:,}: no checkpoint does, do not use it")


def _read_zip(path: Path) -> dict[str, Tensor]:
    """torch.save since 1.6, and TorchScript: a zip archive of one pickle and one entry per storage."""
    refuse_bomb(path)
    with zipfile.ZipFile(path) as archive:
        files = archive.namelist()
        root = next((f.removesuffix("data.pkl") for f in files if re.fullmatch(r"[^/]+/data\.pkl", f)), None)
        if root is None:
            raise ValueError(f"{path} is a zip file of {files[:5]}, no checkpoint: unzip it first")

        @functools.cache  # tied tensors stay tied
        def read(key: str) -> Tensor:
            data = bytearray(archive.read(f"{root}data/{key}"))
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

        top = _Unpickler(archive.open(root + "data.pkl")).load()
        if not getattr(top, "name", "").startswith("__torch__."):
            return _state_dict(path, top, read)
        own = {f"{f[len(root) + 5:-3]}/{name}".replace("/", "."): re.findall(r'"([^"]+)"', lists)
               for f in files if f.startswith(root + "code/") and f.endswith(".py")
               for name, lists in re.findall(r"^class (\w+)\(Module\):\n((?:  __\w+__ = \[.*\]\n)*)",
                                             archive.read(f).decode(), re.MULTILINE)}

        def walk(module: _Inert, prefix: str) -> dict:  # own: parameters and buffers, the rest is no state
            state = {prefix + k: v for k, v in module.items() if _is_tensor(v) and k in own[module.name]}
            for k, v in module.items():
                state |= walk(v, f"{prefix}{k}.") if isinstance(v, _Inert) and v.name in own else {}
            return state

        return _state_dict(path, walk(top, ""), read)


def _state_dict(path: Path, top: object, read=None) -> dict[str, Tensor]:
    """The tensors of what was unpickled: under Lightning's "state_dict", or at the top."""
    state = top if isinstance(top, dict) else {}
    if "trained" in state:
        raise ValueError(f"{path} is a tinyanl adapter, no base: give its run folder to `sample --run`")
    state = state["state_dict"] if isinstance(state.get("state_dict"), dict) else state
    if not any(map(_is_tensor, state.values())):
        raise ValueError(f"{path} holds no tensors at its top or under 'state_dict', only {[*state][:5]}: "
                         "give a file that holds a model's state_dict()")
    state = {str(k): _tensor(v, read) for k, v in state.items() if _is_tensor(v)}
    if (count := sum(v.nbytes for v in state.values())) > 2 * path.stat().st_size + (1 << 20):
        raise ValueError(f"{path} ({path.stat().st_size:,} bytes) describes tensors of {count:,}: do not use it")
    return state


def unreadable(path: Path, why: str) -> ValueError:
    """The error for a file that should be downloaded again."""
    size = f"{path.stat().st_size:,}" + (f" of {SIZES[path.name]:,}" if path.name in SIZES else "")
    return ValueError(f"{path} ({size} bytes) {why}: download it again (links: python -m tinyanl.weights)")


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Name -> tensor in the file's own dtype, from any released container: torch.save's two formats, Lightning,
    TorchScript, safetensors. No code from the file runs. ValueError or FileNotFoundError say what is wrong."""
    path = Path(path)
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        inside = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else "nothing: no such folder"
        raise FileNotFoundError(f"no file {path}, give one that exists; {folder} holds {inside}")
    with open(path, "rb") as file:
        head = file.read(64)
    try:
        if head.startswith(b"PK"):
            return _read_zip(path)
        if head.startswith(b"\x80"):  # torch.save before 1.6: torch's own restricted reader knows it
            return _state_dict(path, torch.load(path, map_location="cpu", weights_only=True))
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1e9:
            from safetensors.torch import load_file
            return load_file(path)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} is a .safetensors file: python -m pip install safetensors") from error
    except Exception as error:  # whatever a damaged or hostile file sets off
        if str(error).startswith(str(path)):
            raise
        raise unreadable(path, f"is cut off, damaged or unsafe ({error!r:.200})") from error
    for start, what in ((b"version https://git-lfs", "is a Git LFS pointer: `git lfs pull`, or else"),
                        (b"<", "is a web page saved as a file"), (b"\x1f\x8b", "is gzipped, no checkpoint"),
                        (b"", f"is no checkpoint, it starts with {head[:16]!r}: move it elsewhere, or else" if head
                         else "is empty")):
        if head.lstrip().startswith(start):
            raise unreadable(path, what)
