"""What a weights file turns out to be, and the models in it.

Files are known by the tensors inside them, never by their names. Wrappings are taken off and other
people's names turned into the released ones, so that whatever comes behind sees one kind of file.
"""
import gzip
import json
import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .checkpoint import load_checkpoint, unreadable
from .clip import CLIP
from .layouts import (
    FIRST_STAGE_CONFIG,
    SCHEDULE_CONFIG,
    UNET_CONFIG,
    differences,
    first_stage_from_diffusers,
    unet_from_diffusers,
)
from .runs import one_line
from .schedule import ldm_alpha_bar
from .tokenizer import Tokenizer
from .unet import UNet, averaged_weights

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
CLASSES = "cond_stage_model.embedding.weight"
LDMS = {  # channels, width of the context, classes
    (192, 512, 1001): "cin256-v2",
    (256, 512, 1000): "cin256 f8",
    (192, 640, None): "text2img256",
    (224, None, None): "celeba256 or ffhq256",
}
VITS = {  # pixels, patch, width, embedding
    (224, 32, 768, 512): "ViT-B/32",
    (224, 16, 768, 512): "ViT-B/16",
    (224, 14, 1024, 768): "ViT-L/14",
    (336, 14, 1024, 768): "ViT-L/14@336px",
}
STABLE_DIFFUSION = {768: "1", 1024: "2", 2048: "XL"}  # width of the context -> version
OPENAI_CLIP = (  # names of the patches, positions, projection and words of a CLIP
    "visual.conv1.weight",
    "visual.positional_embedding",
    "visual.proj",
    "token_embedding.weight",
)
OPEN_CLIP = (*OPENAI_CLIP[:3], "text.token_embedding.weight")
HUGGING_FACE_CLIP = (
    "vision_model.embeddings.patch_embedding.weight",
    "vision_model.embeddings.position_embedding.weight",
    "visual_projection.weight",
    "text_model.embeddings.token_embedding.weight",
)
OTHER_GROUPS = "channels its norms have other groups than tinyanl's"
TIMM_PATCHES = "patch_embed.proj.weight"
Shapes = dict[str, tuple[int, ...]]
IGNORED = (".md", ".json", ".py")  # what may lie in a weights folder and is no weights
SUBFOLDERS = ("unet", "vqvae")  # of diffusers' layout


class Found(NamedTuple):
    """What a file is; which of unet, autoencoder, classes, clip, merges, inception it holds; and
    why it cannot be used, if so."""

    name: str
    parts: tuple[str, ...]
    problem: str | None = None


def identify(state: dict[str, Tensor], config: dict | None = None) -> Found:
    """What a state dict is, by names and shapes alone: tensors on the meta device will do."""
    return recognise(state, config)[0]


def recognise(
    state: dict[str, Tensor], config: dict | None = None
) -> tuple[Found, dict[str, Tensor]]:
    """What a state dict is, and its tensors under the released names.

    `config`: the config.json beside its file, and the scheduler's under "scheduler". What training
    scripts put before names is taken off where the remaining ones are known."""
    tensors = {re.sub(r"(?:^|(?<=\.))(?:module|_orig_mod)\.", "", k): v for k, v in state.items()}
    if len(tensors) < len(state):  # two names became one: not a wrapping
        tensors = state
    while tensors:
        found, released = recognise_unwrapped(tensors, config or {})
        if found:
            if tensors.keys() != state.keys():
                wrapped = next(name for name in state if name not in tensors)
                found = found._replace(name=f"{found.name}; names are wrapped as in {wrapped}")
            return found, released
        first = {name.partition(".")[0] for name in tensors}
        if len(first) > 1 or not all("." in name for name in tensors):
            break
        tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    keys = ", ".join(list(state)[:4])
    problem = (f"no file that tinyanl reads has the keys {keys} ... (torchvision's Inception is "
               "not read): see python -m tinyanl.weights")
    return Found("unknown", (), problem), state


def recognise_unwrapped(
    state: dict[str, Tensor], config: dict
) -> tuple[Found | None, dict[str, Tensor]]:
    """As recognise, but None for what is not known as it stands."""
    try:
        found, state = find_diffusers(state, config)
        if found is None:
            found, state = find_ldm(state)
        if found is None:
            found = find_clip(state, config)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        problem = f"a tensor is missing or misshapen: {error!r}; get the whole file"
        return Found("part of an LDM or CLIP", (), problem), state
    if "Mixed_7c.branch_pool.conv.weight" in state and len(state.get("fc.weight", ())) == 1008:
        found = Found("FID Inception", ("inception",))
    if found:
        for name, value in state.items():
            if name.endswith("weight") and not value.is_floating_point():
                problem = f"{name} holds {value.dtype}: get the file that is not quantised"
                return found._replace(problem=problem), state
    return found, state


# Latent diffusion

def find_ldm(state: dict[str, Tensor]) -> tuple[Found | None, dict[str, Tensor]]:
    """What parts of a latent diffusion model a state dict holds, and that with its U-Net under the
    released prefix."""
    if "input_blocks.0.0.weight" in state:  # a U-Net alone
        state = {UNET + name: value for name, value in state.items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    averaged = {name: tuple(value.shape) for name, value in averaged_weights(state).items()}
    unet = without_prefix(shapes, UNET) or averaged
    stage = without_prefix(shapes, FIRST_STAGE) or shapes
    stage = {name: shape for name, shape in stage.items() if not name.startswith("loss.")}
    stage_name = describe_first_stage(stage)
    classes = shapes.get(CLASSES, (None,))[0]
    if not unet:
        return find_first_stage(stage, stage_name, classes), state
    channels = unet["input_blocks.0.0.weight"][0]
    context = unet.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight", (None, None))[1]
    which = LDMS.get((channels, context, classes), f"({channels} channels, context {context})")
    name = f"LDM {which}: U-Net {count_parameters(unet)} parameters"
    parts = ["unet"]
    if stage_name:
        name += f", {stage_name}"
        parts.append("autoencoder")
    if classes:
        name += f", {classes} classes"
        parts.append("classes")
    if averaged:
        name += ", EMA"
    if (scale := scale_factor(state)) != 1:
        name += f", latents scaled by {scale:.5g}"
    return Found(name, tuple(parts), ldm_problem(unet, state, classes)), state


def find_first_stage(stage: Shapes, name: str | None, classes: int | None) -> Found | None:
    """What a file without a U-Net holds: a first stage called `name`, embeddings of classes, both
    or neither."""
    said = []
    parts = []
    if name:
        said.append(f"{name}: {count_parameters(stage)} parameters")
        if codes := stage.get("quantize.embedding.weight"):
            said.append(f"{codes[0]} codes of {codes[1]} numbers")
        parts.append("autoencoder")
    if classes:
        said.append(f"{classes} classes")
        parts.append("classes")
    return Found(", ".join(said), tuple(parts)) if parts else None


def without_prefix(shapes: Shapes, prefix: str) -> Shapes:
    """What stands under a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in shapes.items() if k.startswith(prefix)}


def count_parameters(shapes: Shapes) -> str:
    return f"{sum(math.prod(shape) for shape in shapes.values()):,}"


def describe_first_stage(stage: Shapes) -> str | None:
    """VQ-f4, KL-f8 and so on; None: it is no first stage."""
    if "encoder.conv_in.weight" not in stage:
        return None
    levels = {name.split(".")[2] for name in stage if name.startswith("encoder.down.")}
    kind = "VQ" if "quantize.embedding.weight" in stage else "KL"
    return f"{kind}-f{2 ** len(levels) // 2}"


def ldm_problem(unet: Shapes, state: dict[str, Tensor], classes: int | None) -> str | None:
    """Why a U-Net cannot serve as a base."""
    inputs = unet["input_blocks.0.0.weight"][1]
    time = unet["input_blocks.1.0.emb_layers.1.weight"][0]
    width = unet["input_blocks.1.0.out_layers.3.weight"][0]
    if not classes and any(name.startswith("cond_stage_model.") for name in state):
        reason = "is conditioned on more than classes (text2img256)"
    elif time > width:
        reason = "scales and shifts by the time, which is not supported (lsun_churches256)"
    elif inputs != unet["out.2.weight"][0]:
        reason = f"takes {inputs} channels (inpainting, super-resolution)"
    elif any(".transformer_blocks.1." in name for name in unet):
        reason = "has two transformers in a row"
    elif not is_our_schedule(state.get("alphas_cumprod")):
        reason = "was trained on another noise schedule than 0.0015 to 0.0195 in 1,000 steps"
    elif not 0 < scale_factor(state) < math.inf:
        reason = "has a scale_factor that is no positive number"
    else:
        return None
    return (f"this U-Net {reason}: you want cin256-v2, nitro/cin/model.ckpt "
            "(python -m tinyanl.weights)")


def is_our_schedule(alpha_bar: Tensor | None) -> bool:
    """Whether a checkpoint's alphas_cumprod, where it has them, are those that tinyanl uses. Half
    precision rounds them by up to 0.004."""
    expected = ldm_alpha_bar()
    if alpha_bar is None or alpha_bar.is_meta:
        return True
    if alpha_bar.shape != expected.shape:
        return False
    return torch.allclose(alpha_bar.double(), expected, rtol=0, atol=0.004)


def null_class_warning(state: dict[str, Tensor]) -> str | None:
    """What to know where nothing says that the last of a file's classes means "no class": cin256-v2
    has 1,001, and what has an image_size is tinyanl's own."""
    if CLASSES not in state or "image_size" in state:
        return None
    classes = len(state[CLASSES])
    if classes == 1001:
        return None
    warning = f"class {classes - 1}, the last of {classes}, is taken to mean 'no class'"
    if classes == 1000:
        warning += ("; of ImageNet's own 1,000 classes none does. The paper's base is cin256-v2, "
                    "nitro/cin/model.ckpt, which has one more")
    return warning


def scale_factor(state: dict[str, Tensor]) -> float:
    """What latents are multiplied by before diffusion: a number that LDM keeps for KL models which
    it trained with scale_by_std. NaN: it is no single number."""
    scale = state.get("scale_factor")
    if scale is None or scale.is_meta:
        return 1.0
    return float(scale) if scale.numel() == 1 else math.nan


# diffusers' layout

def find_diffusers(
    state: dict[str, Tensor], config: dict
) -> tuple[Found | None, dict[str, Tensor]]:
    """What a state dict in diffusers' layout is, and its tensors under the released names; None:
    it is in another layout."""
    if "conv_in.weight" in state and any(name.startswith("down_blocks.") for name in state):
        return find_diffusers_unet(state, config)
    if not any(name.startswith("encoder.down_blocks.") for name in state):
        return None, state
    if "quantize.embedding.weight" not in state:
        return Found("the first stage of Stable Diffusion (AutoencoderKL) in diffusers' layout", (),
                     "no U-Net that tinyanl reads was trained on its latents: get "
                     "CompVis/ldm-celebahq-256 or an LDM (python -m tinyanl.weights)"), state
    channels = len(state["encoder.conv_in.weight"])
    problem = None
    if wrong := differences(config, FIRST_STAGE_CONFIG):
        problem = f"its config.json says that {', '.join(wrong)}: get CompVis/ldm-celebahq-256"
    elif channels < 128:
        problem = f"with {channels} {OTHER_GROUPS}: get CompVis/ldm-celebahq-256"
    if problem:
        return Found("a VQModel in diffusers' layout", ("autoencoder",), problem), state
    found, released = find_ldm(first_stage_from_diffusers(state))
    return found._replace(name=f"{found.name}, diffusers' layout"), released


def find_diffusers_unet(
    state: dict[str, Tensor], config: dict
) -> tuple[Found, dict[str, Tensor]]:
    """What a U-Net in diffusers' layout is, and its tensors under the released names."""
    context = [value.shape[1] for name, value in state.items()
               if name.endswith(".attn2.to_k.weight")]
    remedy = "get CompVis/ldm-celebahq-256 or an LDM (python -m tinyanl.weights)"
    if context:
        version = STABLE_DIFFUSION.get(context[0], "of another kind")
        return Found(f"a Stable Diffusion {version} U-Net in diffusers' layout", ("unet",),
                     f"it is conditioned on texts, {context[0]} numbers a word, and tinyanl has "
                     f"none for it: {remedy}"), state
    channels = len(state["conv_in.weight"])
    problem = diffusers_unet_problem(state, config)
    if problem:
        return Found(f"a UNet2DModel of {channels} channels in diffusers' layout", ("unet",),
                     f"{problem}: {remedy}"), state
    is_described = config.get("_class_name") == "UNet2DModel"
    width = config.get("attention_head_dim", 8) if is_described else 32  # 8: diffusers' default
    found, released = find_ldm(unet_from_diffusers(state, width))
    released["head_channels"] = torch.tensor(width or 0)
    if isinstance(config.get("sample_size"), int) and is_described:
        released["latent_size"] = torch.tensor(config["sample_size"])
    return found._replace(name=f"{found.name}, diffusers' layout"), released


def diffusers_unet_problem(state: dict[str, Tensor], config: dict) -> str | None:
    """Why a UNet2DModel cannot serve as a base. What leaves no trace in its tensors stands in its
    config.json; only the released one is known without."""
    is_described = config.get("_class_name") == "UNet2DModel"
    channels = len(state["conv_in.weight"])
    if not is_described and channels != 224:
        return ("its config.json is not beside it, which says how wide its heads are, so it "
                "cannot be used")
    if wrong := differences(config if is_described else {}, UNET_CONFIG):
        return f"its config.json says that {', '.join(wrong)}"
    heads = config.get("attention_head_dim") if is_described else None
    if heads is not None and not (isinstance(heads, int) and heads > 0):
        return f"its config.json says that attention_head_dim is {heads!r}"
    if wrong := differences(config.get("scheduler", {}), SCHEDULE_CONFIG):
        return f"its scheduler_config.json says that {', '.join(wrong)}"
    if channels < 128:
        return f"with {channels} {OTHER_GROUPS}"
    return None


# CLIP

def find_clip(state: dict[str, Tensor], config: dict) -> Found | None:
    """What CLIP a state dict is; None: no CLIP."""
    if "visual.layer1.0.conv1.weight" in state:
        return Found("CLIP ResNet", ("clip",),
                     "a ResNet CLIP is not supported: use ViT-B/32 or another ViT")
    layout, names = "", OPENAI_CLIP
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        layout, names = ", Hugging Face keys", HUGGING_FACE_CLIP
    elif any(name.startswith("text.") for name in state):
        layout, names = ", open_clip's CustomTextCLIP keys", OPEN_CLIP
    patches, positions, projection, words = names
    remedy = "get a file with both towers (python -m tinyanl.weights)"
    if patches not in state and words not in state:
        if TIMM_PATCHES in state and "cls_token" in state:
            return Found("the image tower of a CLIP alone, or another ViT, in timm's layout", (),
                         f"the text tower is missing: {remedy}")
        return None
    if words not in state:
        return Found("the image tower of a CLIP alone", (), f"the text tower is missing: {remedy}")
    if patches not in state:
        return Found("the text tower of a CLIP alone", (), f"the image tower is missing: {remedy}")
    width, _, _, patch = state[patches].shape
    tokens = len(state[positions])
    dim = state[projection].shape[0 if names is HUGGING_FACE_CLIP else 1]
    pixels = patch * math.isqrt(tokens - 1)
    size = f"ViT ({pixels} px, patch {patch}, width {width}, embedding {dim})"
    name = VITS.get((pixels, patch, width, dim), size)
    return Found(f"CLIP {name}{layout}", ("clip",), activation_problem(config))


def activation_problem(config: dict) -> str | None:
    """Why a CLIP would embed wrongly, by the config.json that transformers writes."""
    for tower in ("vision_config", "text_config"):
        settings = config.get(tower)
        activation = "quick_gelu"  # transformers' default
        if isinstance(settings, dict):
            activation = settings.get("hidden_act", activation)
        if activation != "quick_gelu":
            return (f"its config.json says {activation}, and only CLIPs trained with QuickGELU "
                    "fit: get OpenAI's (python -m tinyanl.weights)")
    return None


# Files

def candidates(folder: Path) -> list[Path]:
    """The files of a weights folder that should hold weights, in the order of their names."""
    paths = list(folder.iterdir())
    for name in SUBFOLDERS:
        paths += (folder / name).glob("*")
    return [path for path in sorted(paths)
            if path.is_file() and path.name[0] != "." and path.suffix not in IGNORED]


def inspect(path: str | Path) -> tuple[Found, dict[str, Tensor]]:
    """What a file is, and its tensors under the released names: {} for BPE merges. Errors as in
    load_checkpoint."""
    path = Path(path)
    if path.is_file() and (lines := merges_lines(path)):
        return Found(f"BPE merges, {lines:,} lines", ("merges",)), {}
    return recognise(load_checkpoint(path), read_config(path))


def merges_lines(path: Path) -> int:
    """How many lines of two symbols a file of BPE merges has; 0: it is none. ValueError: it is
    gzipped and damaged."""
    with open(path, "rb") as file:
        is_zipped = file.read(2) == b"\x1f\x8b"
    opener = gzip.open if is_zipped else open
    try:
        with opener(path, "rb") as file:
            if b"#version" not in file.readline(200):
                return 0
            lines = file.read(1 << 23).splitlines()
    except (EOFError, OSError, zlib.error) as error:
        raise unreadable(path, f"is cut off or damaged ({error})") from error
    if all(len(line.split()) == 2 for line in lines[:1000]):
        return len(lines)
    return 0


def read_config(path: Path) -> dict:
    """The config.json beside a weights file, and diffusers' schedule under "scheduler"; {} where
    there is none. ValueError: it is no JSON object."""
    config = read_json(path.with_name("config.json"))
    scheduler = path.parent.parent / "scheduler" / "scheduler_config.json"
    if path.parent.name == "unet":
        config["scheduler"] = read_json(scheduler)
    return config


def read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): get it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: get it again")
    return content


def head_channels(state: dict[str, Tensor]) -> int | None:
    """How wide the heads of a U-Net are, None: as its blocks. Heads leave no trace in the tensors;
    diffusers' config.json knows them. Released: one as wide as the block with a context, 32
    channels each in cin256 f8 and without a context."""
    if "head_channels" in state:
        return int(state["head_channels"]) or None
    weights = averaged_weights(state) or {
        name.removeprefix(UNET): value for name, value in state.items() if name.startswith(UNET)}
    to_k = weights.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    is_f8 = to_k is not None and to_k.shape[1] == 512 and len(weights["out.0.weight"]) == 256
    return 32 if to_k is None or is_f8 else None


def build(path: Path, part: str, state: dict[str, Tensor]) -> nn.Module | Tensor | Tokenizer:
    """A part of a file: a model in float32, the embeddings of classes, or a tokenizer. ValueError:
    a tensor is missing, left over or misshapen."""
    try:
        if part == "unet":
            return UNet.from_checkpoint(state, head_channels=head_channels(state))
        if part == "autoencoder":
            is_whole = any(name.startswith(FIRST_STAGE) for name in state)
            return Autoencoder.from_checkpoint(state, prefix=FIRST_STAGE if is_whole else "")
        if part == "clip":
            return CLIP.from_checkpoint(state)
        if part == "classes":
            return state[CLASSES].float()
        return Tokenizer(path)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its {part} does not load ({one_line(error)}): get the whole "
                         "file, see weights.md") from error
