"""What is trained: ANL modules, or parts of the U-Net itself, which the paper compares with.

B batch, K tokens, D CLIP embedding width, M context width.
"""
import copy
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from .anl import ANLs
from .unet import Downsample, UNet, Upsample


def nothing(name: str, depth: float) -> bool:
    """The U-Net stays as it is: ANLs at its sites are trained."""
    return False


def everything(name: str, depth: float) -> bool:
    return True


def transformers(name: str, depth: float) -> bool:
    """The U-Net's own transformer blocks, which the paper's count of parameters is that of."""
    return re.match(r"\w+_blocks?\.(\d+\.)?1\.(norm|proj|transformer)", name) is not None


def low_resolutions(name: str, depth: float) -> bool:
    return depth > 0.5


def high_resolutions(name: str, depth: float) -> bool:
    return depth <= 0.5


def self_attention_and_mapping(name: str, depth: float) -> bool:
    return re.search(r"\.(attn1|ff|norm1|norm3)\.", name) is not None


class Way(NamedTuple):
    """A way to tune: which of the U-Net's tensors train, and what the U-Net's context is."""

    trains: Callable[[str, float], bool]  # of a tensor's name and depth, 0 the full resolution
    conditioned: bool  # the condition is the context, in place of "no class"


TUNES = {
    "anl": Way(nothing, conditioned=False),
    "attention": Way(transformers, conditioned=True),
    "all": Way(everything, conditioned=True),
    "scratch": Way(everything, conditioned=True),  # from fresh weights
    "deep": Way(low_resolutions, conditioned=True),  # which parts are transferable?
    "shallow": Way(high_resolutions, conditioned=True),  # after Zhao et al. 2020
    "uncond": Way(self_attention_and_mapping, conditioned=False)}

# Over one context token the softmax is 1 whatever query and key are: these have no effect.
DEAD = re.compile(r"\.(attn2\.to_[qk]|norm2)\.")


def depths(unet: UNet) -> dict[str, float]:
    """Name of every tensor -> the level it works at, 0 (full resolution; also time and output) to 1
    (the lowest)."""
    levels = {}
    level = 0
    for i, layers in enumerate(unet.input_blocks):
        levels[f"input_blocks.{i}."] = level
        if isinstance(layers[0], Downsample):
            level += 1
    levels["middle_block."] = level
    for i, layers in enumerate(unet.output_blocks):
        levels[f"output_blocks.{i}."] = level
        if isinstance(layers[-1], Upsample):
            level -= 1
    deepest = max(1, *levels.values())
    depth = {name: 0.0 for name, _ in unet.named_parameters()}
    for start, level in levels.items():
        depth |= {name: level / deepest for name in depth if name.startswith(start)}
    return depth


def tunable(base, tune: str = "anl", tokens: int = 1, ratio: int = 4) -> nn.ModuleDict:
    """What `tune` trains on a models.Base, fresh: "anls"; or a copy of the "unet" and, where it is
    conditioned, "to_context" (B D -> B K*M: the identity where CLIP and context are equally wide
    and K = 1). The tensors with requires_grad are those that train.

    ValueError: there is no such way, or this U-Net has nothing to train in it."""
    if tune not in TUNES:
        raise ValueError(f"tune={tune!r}: choose from {', '.join(TUNES)}")
    if tune == "anl":
        return nn.ModuleDict({"anls": ANLs(base.unet.sites, base.clip.dim, tokens, ratio)})
    way = TUNES[tune]
    width = base.unet.context_dim
    chosen = {name for name, depth in depths(base.unet).items() if way.trains(name, depth)}
    if not chosen or (width is None and way.conditioned):
        raise ValueError(f"tune={tune!r} needs a U-Net with transformer blocks, not that of "
                         f"{base.name}: choose anl")
    model = nn.ModuleDict({"unet": copy.deepcopy(base.unet)})
    if tune == "scratch":
        reset(model)
    for name, p in model["unet"].named_parameters():
        p.requires_grad_(name in chosen)
    if way.conditioned:
        same = tokens == 1 and base.clip.dim == width
        model["to_context"] = nn.Identity() if same else nn.Linear(base.clip.dim, tokens * width)
    return model


def reset(model: nn.Module) -> None:
    """Torch's fresh weights everywhere, where LDM itself begins with some layers at zero."""
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def unet_of(base, model: nn.ModuleDict) -> UNet:
    """The U-Net that computes: the copy that trains, or else the frozen one."""
    if "unet" in model:
        return model["unet"]
    return base.unet


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `tunable` that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give the tensors that train the values of others, and their memory.

    LookupError, TypeError, RuntimeError: they are not the same ones."""
    expected = trained(model)
    differing = sorted(tensors.keys() ^ expected.keys())
    if differing:
        raise LookupError(f"{len(differing)} tensors are missing or too many: {differing[:3]}")
    for name, p in expected.items():  # before any copy: a tensor may be one number, repeated
        given = tensors[name]
        if given.shape != p.shape or not given.is_floating_point():
            raise TypeError(f"{name} is {given.dtype} {tuple(given.shape)}, not {tuple(p.shape)}")
    values = {name: tensor.float() for name, tensor in tensors.items()}
    model.load_state_dict(values, strict=False, assign=True)
