"""CLIP: an image and a text tower whose embeddings meet in one space (Radford et al. 2021, arXiv
2103.00020).

    image (B 3 R R) -> (B D)        text tokens (B L) -> (B D)        similarity = cosine of the two

Both are pre-norm transformers, x + attn(norm(x)) then x + mlp(norm(x)), with heads 64 wide; the
image is read at its class token, the text at its end token, where causal attention has seen every
word. Attribute names are OpenAI's, so the released state dicts load as they are; sizes come from
the tensors. Only for weights trained with QuickGELU (OpenAI's, and open_clip's "-quickgelu"):
plain-GELU ones have the same keys and would load, but embed wrongly.

B batch, R resolution, N = (R/patch)^2 + 1 tokens (L in text), W width, G heads, D embedding width.

Copy this file alone: it needs torch, torchvision and einops, nothing else of tinyanl. Usage:

    import torch
    from clip import CLIP
    clip = CLIP(resolution=64, patch=8, vision_width=64, vision_layers=2,
                context_length=16, vocab_size=100, text_width=64, text_layers=2, dim=32)
    again = CLIP.from_checkpoint(clip.state_dict())       # or that of a released ViT-B-32.pt
    tokens = torch.tensor([[98, 5, 7, 99, 0, 0]])         # start, words, end, padding
    print(again.encode_image(torch.randn(1, 3, 64, 64)).shape, again.encode_text(tokens).shape)
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

# Mean and standard deviation of the pictures' colours, published with the weights.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HUGGING_FACE = {  # a piece of transformers' name -> the piece of OpenAI's, in this order
    "vision_model.encoder.layers": "visual.transformer.resblocks",
    "text_model.encoder.layers": "transformer.resblocks",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding": "visual.conv1",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
    "self_attn": "attn",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# OpenAI's archives list these numbers among the tensors.
NUMBERS = ("input_resolution", "context_length", "vocab_size")
SIZED_BY = (
    "visual.conv1.weight",  # W 3 patch patch
    "visual.positional_embedding",  # N W
    "visual.proj",  # W D
    "positional_embedding",  # L W
    "token_embedding.weight",  # vocabulary W
)


class Attention(nn.Module):
    """Multi-head self-attention (B N W) -> (B N W); q, k, v come from one joined projection."""

    def __init__(self, width: int, causal: bool):
        super().__init__()
        if width % 64:
            raise ValueError(f"width={width} is not a multiple of 64, the head width of the "
                             "released ViTs")
        self.heads = width // 64
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # B N 3W
        q, k, v = rearrange(qkv, "b n (three g d) -> three b g n d", three=3, g=self.heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # B G N 64
        return self.out_proj(rearrange(x, "b g n d -> b n (g d)"))  # B N W


class Block(nn.Module):
    """Pre-norm transformer block (B N W) -> (B N W), one of `layers` in its tower."""

    def __init__(self, width: int, causal: bool, layers: int):
        super().__init__()
        self.attn = Attention(width, causal)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({
            "c_fc": nn.Linear(width, 4 * width),
            "c_proj": nn.Linear(4 * width, width),
        })
        self.ln_2 = nn.LayerNorm(width)
        into = width**-0.5
        out = (2 * layers * width) ** -0.5  # the outputs of 2 * layers maps add up in x
        nn.init.normal_(self.attn.in_proj_weight, std=into)
        nn.init.normal_(self.attn.out_proj.weight, std=out)
        nn.init.normal_(self.mlp["c_fc"].weight, std=into / 2**0.5)
        nn.init.normal_(self.mlp["c_proj"].weight, std=out)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        h = self.mlp["c_fc"](self.ln_2(x))  # B N 4W
        h = h * torch.sigmoid(1.702 * h)  # QuickGELU
        return x + self.mlp["c_proj"](h)


def transformer(width: int, layers: int, causal: bool) -> nn.Sequential:
    """A stack of blocks under the released name `resblocks`, (B N W) -> (B N W)."""
    blocks = nn.Sequential(*(Block(width, causal, layers) for _ in range(layers)))
    return nn.Sequential(OrderedDict(resblocks=blocks))


class VisionTransformer(nn.Module):
    """ViT: (B 3 R R) -> (B D). A class token, put in front of the patches, collects the summary."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, dim: int):
        super().__init__()
        scale = width**-0.5
        positions = (resolution // patch) ** 2 + 1
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = transformer(width, layers, causal=False)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, dim))

    def tokens(self, x: Tensor) -> Tensor:
        """Images (B 3 R R) -> the class token and every patch after the last block, (B N W)."""
        x = rearrange(self.conv1(x), "b w i j -> b (i j) w")  # B N-1 W
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)  # B N W
        return self.transformer(self.ln_pre(x + self.positional_embedding))

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_post(self.tokens(x)[:, 0]) @ self.proj  # B D


class CLIP(nn.Module):
    """The two towers; the defaults are ViT-B/32. Embeddings are not normalised, as released."""

    def __init__(
        self,
        resolution: int = 224,
        patch: int = 32,
        vision_width: int = 768,
        vision_layers: int = 12,
        context_length: int = 77,
        vocab_size: int = 49408,
        text_width: int = 512,
        text_layers: int = 12,
        dim: int = 512,
    ):
        super().__init__()
        self.resolution = resolution
        self.context_length = context_length
        self.dim = dim
        self.visual = VisionTransformer(resolution, patch, vision_width, vision_layers, dim)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, text_width))
        self.transformer = transformer(text_width, text_layers, causal=True)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(text_width**-0.5 * torch.randn(text_width, dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    @classmethod
    def from_checkpoint(cls, state: dict[str, Tensor]) -> "CLIP":
        """A float32 CLIP with the sizes and weights of OpenAI's, open_clip's or Hugging Face's
        state dict. Tensors that are float32 already are shared, not copied.

        ValueError: a ResNet CLIP, or missing, unexpected or misshapen tensors."""
        state = {k: v.float() for k, v in openai_keys(state).items() if k not in NUMBERS}
        if any(k.startswith("visual.layer1.") for k in state):
            raise ValueError("a ResNet CLIP (visual.layer1 ...): use a ViT, such as ViT-B/32, "
                             "ViT-B/16 or ViT-L/14")
        if missing := [k for k in SIZED_BY if k not in state]:
            raise ValueError(f"not a complete CLIP: missing {missing}, among the {len(state)} "
                             f"found {list(state)[:5]}")
        conv, grid, proj, positions, tokens = (state[k] for k in SIZED_BY)
        patch = conv.shape[-1]
        with torch.device("meta"):  # neither memory nor time for weights that are replaced at once
            model = cls(
                resolution=patch * round((len(grid) - 1) ** 0.5),
                patch=patch,
                vision_width=len(conv),
                vision_layers=count_layers(state, "visual.transformer.resblocks."),
                context_length=len(positions),
                vocab_size=tokens.shape[0],
                text_width=tokens.shape[1],
                text_layers=count_layers(state, "transformer.resblocks."),
                dim=proj.shape[1],
            )
        if wrong := differences(state, model.state_dict()):
            raise ValueError(f"not a ViT CLIP, {len(wrong)} tensors differ: "
                             f"{'; '.join(wrong[:5])}")
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def preprocess(self, image) -> Tensor:
        """PIL image, any size and mode -> (3 R R) float32, normalised.

        It becomes RGB after the crop, as released."""
        image = TF.resize(image, self.resolution, InterpolationMode.BICUBIC)  # the shorter side
        image = TF.center_crop(image, self.resolution).convert("RGB")
        return TF.normalize(TF.to_tensor(image), MEAN, STD)

    def normalize(self, x: Tensor) -> Tensor:
        """Pictures (B 3 R R) in [-1, 1] -> what encode_image takes."""
        mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) for values in (MEAN, STD))
        return ((x + 1) / 2 - mean) / std

    @torch.no_grad()
    def embed(self, x: Tensor, batch: int = 256) -> Tensor:
        """Pictures (N 3 R R) in [-1, 1] -> unit embeddings (N D) on the CPU."""
        device = self.logit_scale.device
        parts = []
        for part in x.split(batch):
            parts.append(self.encode_image(self.normalize(part.float().to(device))))
        return F.normalize(torch.cat(parts), dim=-1).cpu()

    def encode_image(self, x: Tensor) -> Tensor:
        """Preprocessed images (B 3 R R) -> embeddings (B D). ValueError for another size."""
        if x.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(f"{tuple(x.shape)} is not (B, 3, {self.resolution}, "
                             f"{self.resolution}): .preprocess makes that")
        return self.visual(x)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids (B L) -> embeddings (B D). ValueError if L is beyond the context length."""
        if tokens.shape[1] > self.context_length:
            raise ValueError(f"texts of {tokens.shape[1]} tokens, this CLIP takes at most "
                             f"{self.context_length}")
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # B L W
        x = self.ln_final(self.transformer(x))
        end = tokens.argmax(dim=-1)  # the end token has the largest id; behind it is padding
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection  # B D


def count_layers(state: dict[str, Tensor], tower: str) -> int:
    """How many blocks stand under the prefix `tower`."""
    return len({k.removeprefix(tower).split(".")[0] for k in state if k.startswith(tower)})


def differences(state: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """In words, where the names and shapes of `state` are not the expected ones."""
    missing = [f"missing {k}" for k in expected if k not in state]
    unexpected = [f"unexpected {k}" for k in state if k not in expected]
    misshapen = []
    for name in state.keys() & expected.keys():
        here, there = list(state[name].shape), list(expected[name].shape)
        if here != there:
            misshapen.append(f"{name} is {here}, not {there}")
    return missing + unexpected + sorted(misshapen)


def openai_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's state dict under OpenAI's names. It comes under them; or as open_clip's
    CustomTextCLIP, where the text tower stands under `text.`; or under Hugging Face's, where q, k
    and v are three tensors and projections lie transposed."""
    if any(k.startswith("text.") for k in state):
        return {k.removeprefix("text."): v for k, v in state.items()}
    if not any(k.startswith(("vision_model.", "text_model.")) for k in state):
        return state
    out = {}
    for name, value in state.items():
        for piece, released in HUGGING_FACE.items():
            name = name.replace(piece, released)
        if name in ("visual.proj", "text_projection"):
            value = value.T
        if not name.endswith("position_ids"):  # 0, 1, 2, ...: a buffer of older versions
            out[name] = value
    for q in [name for name in out if ".q_proj." in name]:
        qkv = [q.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
        if all(name in out for name in qkv):  # or else from_checkpoint says what is missing
            out[q.replace("q_proj.", "in_proj_")] = torch.cat([out.pop(name) for name in qkv])
    return out
