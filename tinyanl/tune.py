"""What is trained: ANL modules, or parts of the U-Net itself, which the paper compares with. B batch, K tokens,
D CLIP embedding width, M context width.
"""
import copy
import re
from collections.abc import Callable

from torch import Tensor, nn

from .anl import ANLs
from .unet import Downsample, UNet, Upsample

# --tune -> whether a tensor of the U-Net trains, by its name and depth (0 the full resolution, 1 the lowest), and
# whether the condition is the U-Net's context, in place of "no class". All but `anl` are what the paper compares with.
TUNES: dict[str, tuple[Callable[[str, float], object], bool]] = {
    "anl": (lambda name, depth: False, False),  # the U-Net stays as it is: ANLs at its sites are trained
    "attention": (lambda name, depth: re.match(r"\w+_blocks?\.(\d+\.)?1\.(norm|proj|transformer)", name), True),
    "all": (lambda name, depth: True, True),
    "scratch": (lambda name, depth: True, True),  # all, from torch's fresh weights: LDM itself zeroes some layers
    "deep": (lambda name, depth: depth > 0.5, True),  # the low-resolution half, and the other one: which parts are
    "shallow": (lambda name, depth: depth <= 0.5, True),  # transferable? (after Zhao et al. 2020)
    "uncond": (lambda name, depth: re.search(r"\.(attn1|ff|norm1|norm3)\.", name), False)}  # self-attention, mapping
DEAD = re.compile(r"\.(attn2\.to_[qk]|norm2)\.")  # over one context token, softmax is 1 whatever query and key are


def depths(unet: UNet) -> dict[str, float]:
    """Name of every tensor -> the level it works at, 0 (full resolution; also time and output) to 1 (the lowest)."""
    level, levels = 0, {}
    for name, blocks in (("input_blocks", unet.input_blocks), ("output_blocks", unet.output_blocks)):
        for i, layers in enumerate(blocks):
            levels[f"{name}.{i}."] = level
            level += isinstance(layers[0], Downsample) - isinstance(layers[-1], Upsample)
        levels.setdefault("middle_block.", level)
    deepest = max(1, *levels.values())
    return {name: next((n / deepest for start, n in levels.items() if name.startswith(start)), 0.0)
            for name, _ in unet.named_parameters()}


def tunable(base, tune: str = "anl", tokens: int = 1, ratio: int = 4) -> nn.ModuleDict:
    """What `tune` trains on a models.Base, fresh: "anls"; or a copy of the "unet" and, where it is conditioned,
    "to_context" (B D -> B K*M: the identity where CLIP and context are equally wide and K = 1). The tensors with
    requires_grad are those that train. ValueError: there is no such way, or this U-Net has nothing to train in it."""
    if tune not in TUNES:
        raise ValueError(f"tune={tune!r}: choose from {', '.join(TUNES)}")
    if tune == "anl":
        return nn.ModuleDict({"anls": ANLs(base.unet.sites, base.clip.dim, tokens, ratio)})
    (trains, conditioned), width, depth = TUNES[tune], base.unet.context_dim, depths(base.unet)
    chosen = {name for name, level in depth.items() if trains(name, level)}
    if width is None and conditioned or not chosen:
        raise ValueError(f"tune={tune!r} needs a U-Net with transformer blocks, not that of {base.name}: choose anl")
    model = nn.ModuleDict({"unet": copy.deepcopy(base.unet)})
    if tune == "scratch":
        for module in model.modules():
            getattr(module, "reset_parameters", lambda: None)()
    for name, p in model["unet"].named_parameters():
        p.requires_grad_(name in chosen)
    if conditioned:
        same = tokens == 1 and base.clip.dim == width
        model["to_context"] = nn.Identity() if same else nn.Linear(base.clip.dim, tokens * width)
    return model


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `tunable` that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def put(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the tensors that train the values of others. LookupError, RuntimeError: they are not the same ones."""
    if odd := tensors.keys() ^ trained(model).keys():
        raise LookupError(f"{len(odd)} tensors are missing or too many: {sorted(odd)[:3]}")
    for name, p in trained(model).items():  # before any copy: a tensor may be one number, repeated
        if tensors[name].shape != p.shape or not tensors[name].is_floating_point():
            raise TypeError(f"{name} is {tensors[name].dtype} {tuple(tensors[name].shape)}, not {tuple(p.shape)}")
    model.load_state_dict({name: x.float() for name, x in tensors.items()}, strict=False, assign=True)
