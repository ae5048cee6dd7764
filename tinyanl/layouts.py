"""diffusers' names for the tensors of a latent diffusion model, turned into the released ones.

    unet_from_diffusers(UNet2DModel's state dict)  ->  what unet.UNet.from_checkpoint reads
    first_stage_from_diffusers(VQModel's)          ->  what autoencoder.Autoencoder reads

The released names are those of CompVis' latent-diffusion. Nothing is computed: tensors are renamed,
reshaped, and the queries, keys and values of the U-Net's attention laid side by side. A name that
is in no table is an error. Old files call an attention's layers query, key, value and proj_attn.

Copy this file alone: it needs torch and einops, nothing else of tinyanl. Usage:

    import torch
    from layouts import unet_from_diffusers
    names = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "conv_norm_out.bias")
    state = {name: torch.zeros(8) for name in names}
    print(list(unet_from_diffusers(state, head_channels=32)))
"""
import re

import torch
from einops import rearrange
from torch import Tensor

UNET = {  # diffusers' name -> the released one, of what stands outside the blocks
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {  # inside a residual block of the U-Net
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {  # old and new names -> what the layer is
    "group_norm": "norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
FIRST_STAGE = {  # inside encoder. and decoder.
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
}
PLACE = re.compile(  # where a tensor of a block stands, and its name there
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
# Settings that leave no trace in the tensors: what this U-Net and this first stage compute with.
# They are diffusers' defaults too, which hold where a config.json does not name them.
UNET_CONFIG = {
    "act_fn": "silu",
    "add_attention": True,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
}
FIRST_STAGE_CONFIG = {"act_fn": "silu", "norm_num_groups": 32, "norm_type": "group"}
SCHEDULE_CONFIG = {
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "trained_betas": None,
}


def differences(config: dict, expected: dict) -> list[str]:
    """In words, the settings of a config.json that differ from the expected ones."""
    different = []
    for name, value in expected.items():
        if name in config and config[name] != value:
            different.append(f"{name} is {config[name]!r}, not {value!r}")
    return different


def renamed(name: str, layers: dict[str, str]) -> str:
    """A name such as "conv1.weight" with conv1 under its released name. KeyError: it has none."""
    layer, _, kind = name.rpartition(".")
    return f"{layers[layer]}.{kind}"


def outside_blocks(name: str, places: dict[str, str]) -> tuple[str, str]:
    """The released place of a tensor that stands in no down or up block, and the rest of its name.
    KeyError: `places` does not have it."""
    for place, released in places.items():
        if name.startswith(f"{place}."):
            return released, name.removeprefix(f"{place}.")
    raise KeyError(name)


def unet_name(name: str, blocks: int, attends: set[str]) -> str:
    """The released name of a tensor of a UNet2DModel; q, k and v still have one each.

    blocks: how many residual blocks a level has on the way down. attends: the levels on the way up
    that have attention. KeyError: no such model has that tensor."""
    found = PLACE.fullmatch(name)
    if not found:
        place, inside = outside_blocks(name, UNET)
        if not name.startswith("mid_block."):
            return f"{place}.{inside}"
    else:
        way, level, kind, n, inside = found.groups()
        first = int(level) * (blocks + 1)  # of this level, among all blocks on its way
        if kind == "downsamplers":
            return f"input_blocks.{first + blocks + 1}.0.op.{inside.removeprefix('conv.')}"
        if kind == "upsamplers":  # behind the residual block, and its attention where it has one
            return f"output_blocks.{first + blocks}.{2 if level in attends else 1}.{inside}"
        layer = 0 if kind == "resnets" else 1
        if way == "down":
            place = f"input_blocks.{first + int(n) + 1}.{layer}"
        else:
            place = f"output_blocks.{first + int(n)}.{layer}"
    return f"{place}.{renamed(inside, ATTENTION if '.attentions.' in name else RESNET)}"


def unet_from_diffusers(state: dict[str, Tensor], head_channels: int | None) -> dict[str, Tensor]:
    """The state dict of a UNet2DModel under the released names, without a prefix.

    head_channels: its attention_head_dim; None is one head as wide as its block. ValueError: a name
    that no such model has."""
    places = {tuple(name.split(".")[:4]) for name in state}
    blocks = sum(place[:3] == ("down_blocks", "0", "resnets") for place in places)
    attends = {place[1] for place in places if place[0::2] == ("up_blocks", "attentions")}
    released = {}
    for name, value in state.items():
        try:
            released[unet_name(name, blocks, attends)] = value
        except KeyError as error:
            raise ValueError(f"{name} is no name of diffusers' UNet2DModel") from error
    for name in [name for name in released if re.search(r"\.q\.(weight|bias)$", name)]:
        place, _, kind = name.rpartition(".q.")
        parts = [f"{place}.{letter}.{kind}" for letter in "qkv"]
        if all(part in released for part in parts):  # or else loading says what is missing
            qkv = torch.stack([released.pop(part) for part in parts])
            width = head_channels or qkv.shape[1]
            qkv = rearrange(qkv, "three (g d) ... -> (g three d) ...", d=width)  # of each head
            released[f"{place}.qkv.{kind}"] = qkv
    for name, value in released.items():  # linear maps, and 1x1 convolutions in the oldest files
        if name.endswith((".qkv.weight", ".1.proj_out.weight")):
            released[name] = value.flatten(1)[..., None]  # C_out C_in 1
    return released


def first_stage_name(name: str, levels: int) -> str:
    """The released name of a tensor of a VQModel. KeyError: no such model has it."""
    tower, _, rest = name.partition(".")
    is_outside = not rest.startswith(("down_blocks.", "up_blocks.", "mid_block.", "conv_norm_out."))
    if is_outside:
        return name  # conv_in, conv_out, quant_conv, post_quant_conv, quantize.embedding
    found = PLACE.fullmatch(rest)
    if not found:
        place, inside = outside_blocks(rest, FIRST_STAGE)
    else:
        way, level, kind, n, inside = found.groups()
        if way == "up":
            level = levels - 1 - int(level)  # diffusers counts the decoder's from the lowest on
        if kind in ("downsamplers", "upsamplers"):
            return f"{tower}.{way}.{level}.{kind.removesuffix('rs')}.{inside}"
        place = f"{way}.{level}.{'block' if kind == 'resnets' else 'attn'}.{n}"
    if ".attentions." in name:
        inside = renamed(inside, ATTENTION)
    return f"{tower}.{place}.{inside.replace('conv_shortcut', 'nin_shortcut')}"


def first_stage_from_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a VQModel under the released names, without a prefix. ValueError: a name
    that no such model has."""
    levels = len({name.split(".")[2] for name in state if name.startswith("decoder.up_blocks.")})
    released = {}
    for name, value in state.items():
        try:
            new = first_stage_name(name, levels)
        except KeyError as error:
            raise ValueError(f"{name} is no name of diffusers' VQModel") from error
        if ".attentions." in name and value.dim() == 2:
            value = value[..., None, None]  # C C 1 1: a linear map is a 1x1 convolution
        released[new] = value
    return released
