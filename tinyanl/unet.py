"""The U-Net of latent diffusion (Rombach et al. 2022), built from a released checkpoint's own
tensors.

Attribute names are the released keys, so a checkpoint loads with strict=True and nothing is
converted. Two kinds: with a context (cin256-v2: a SpatialTransformer per block) and without one
(celeba256, ffhq256: an AttentionBlock). `extra(site, h)` is called at the end of every residual
block: anything may be inserted there, and the state dict stays the released one.
B batch, C channels, H W sides, N = H*W positions, M context tokens, G heads, E = 4*channels.

Copy this file alone: it needs torch and einops, nothing else of tinyanl. Usage:

    import torch
    from unet import UNet
    unet = UNet(channels=32, mult=(1, 2), attention=(False, True), context_dim=16)
    eps = unet(torch.randn(2, 3, 16, 16), torch.tensor([10, 999]), context=torch.randn(2, 1, 16))
    again = UNet.from_checkpoint(unet.state_dict(), prefix="")   # UNet() has cin256-v2's sizes
    print(unet.sites, eps.shape)
"""
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def memory_format(device: torch.device) -> torch.memory_format:
    """How tensors should lie in memory on a device: channels last, but not on MPS, where the
    backward pass is then reported to be 30 times slower (pytorch issue 193349)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


class GroupNorm(nn.GroupNorm):
    """32 groups at every released width. Fewer in a narrow model: a group of one channel would
    subtract exactly the constant that the time embedding has just added to that channel, and the
    block would not know the time.

    Convolutions are fastest with channels last in memory. This norm is not, on a CPU: it gets them
    first, in a copy."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, h: Tensor) -> Tensor:
        h = super().forward(h.contiguous())
        return h.contiguous(memory_format=memory_format(h.device))


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the timestep, cosines first.  t (B,) -> (B dim)."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, time_dim: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(c_in),
            nn.SiLU(),
            nn.Conv2d(c_in, c_out, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, c_out))
        self.out_layers = nn.Sequential(
            GroupNorm(c_out),
            nn.SiLU(),
            nn.Identity(),  # the released model's dropout of 0: keeps the number in the next key
            nn.Conv2d(c_out, c_out, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.in_layers(h) + self.emb_layers(emb)[:, :, None, None]  # B C H W
        return self.skip_connection(h) + self.out_layers(x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of q (B N C) to k and v (B M C) -> (B N C)."""
    # One head is as wide as its block: too wide for flash attention on a GPU, and on a CPU its
    # gradients are slow.
    if heads == 1:
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)  # B N M
        return scores.softmax(dim=-1) @ v
    q, k, v = (rearrange(x, "b n (g d) -> b g n d", g=heads) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v)  # B G N C/G
    return rearrange(x, "b g n d -> b n (g d)")


class AttentionBlock(nn.Module):
    """Self-attention over positions (unconditional models)."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.qkv(self.norm(h).flatten(2))  # B 3C N: each head's q, k and v lie side by side
        q, k, v = rearrange(x, "b (g three d) n -> three b n (g d)", g=self.heads, three=3)
        x = attend(q, k, v, self.heads).transpose(1, 2)  # B C N
        return h + self.proj_out(x).view_as(h)


class CrossAttention(nn.Module):
    """Attention to the context, or to x itself where there is none."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        x = attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads)
        return self.to_out(x)


class FeedForward(nn.Module):
    """GEGLU: one half of a linear map gates the other, and a second map leads back."""

    def __init__(self, channels: int):
        super().__init__()
        proj = nn.Linear(channels, 8 * channels)
        back = nn.Linear(4 * channels, channels)
        self.net = nn.ModuleList([nn.ModuleDict({"proj": proj}), nn.Identity(), back])

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.net[0]["proj"](x).chunk(2, dim=-1)  # each B N 4C
        return self.net[2](x * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward."""

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context_dim, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if context.shape[1] == 1:  # a softmax over one key is 1, whatever the query: just a bias
            x = x + self.attn2.to_out(self.attn2.to_v(context))
        else:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A TransformerBlock over positions, between two 1x1 convolutions."""

    def __init__(self, channels: int, context_dim: int, head_channels: int):
        super().__init__()
        heads = channels // head_channels
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, heads)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = rearrange(self.proj_in(self.norm(h)), "b c h w -> b (h w) c")  # B N C
        x = self.transformer_blocks[0](x, context)
        return h + self.proj_out(rearrange(x, "b (h w) c -> b c h w", h=h.shape[2]))


def attention_layer(
    channels: int, context_dim: int | None, head_channels: int | None
) -> AttentionBlock | SpatialTransformer:
    """What follows a residual block where its level has attention. ValueError: heads do not fit."""
    head_channels = head_channels or channels
    if channels % head_channels:
        raise ValueError(f"head_channels={head_channels} does not divide a block of {channels} "
                         "channels")
    if context_dim is None:
        return AttentionBlock(channels, head_channels)
    return SpatialTransformer(channels, context_dim, head_channels)


class Downsample(nn.Sequential):
    """Half the resolution, by a convolution."""

    def __init__(self, channels: int):
        super().__init__(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class Upsample(nn.Sequential):
    """Twice the resolution: nearest neighbours, then a convolution."""

    def __init__(self, channels: int):
        nearest = nn.Upsample(scale_factor=2)
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        super().__init__(OrderedDict(nearest=nearest, conv=conv))


class UNet(nn.Module):
    """The denoiser eps(z_t, t, context). Defaults are cin256-v2: 400,920,579 parameters in 688
    tensors.

    `attention[i]`: level i has attention. `context_dim`: None is a U-Net without a context.
    `head_channels`: None is one head as wide as its block (cin256-v2); celeba256 and ffhq256 have
    32. `sites`: site name -> channels, one per residual block, in order of use."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        channels: int = 192,
        mult: tuple[int, ...] = (1, 2, 3, 5),
        blocks: int = 2,
        attention: tuple[bool, ...] = (False, True, True, True),
        context_dim: int | None = 512,
        head_channels: int | None = None,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.channels = channels
        self.context_dim = context_dim
        # Keep no activations inside a block: recompute them in the backward pass.
        self.checkpointing = False
        self.sites = {}
        time_dim = 4 * channels

        def block(site: str, c_in: int, level: int) -> nn.ModuleList:
            c_out = self.sites[site] = channels * mult[level]
            after = []
            if attention[level]:
                after.append(attention_layer(c_out, context_dim, head_channels))
            return nn.ModuleList([ResBlock(c_in, c_out, time_dim), *after])

        self.time_embed = nn.Sequential(
            nn.Linear(channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim)
        )
        conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.input_blocks = nn.ModuleList([nn.ModuleList([conv_in])])
        c = channels
        skips = [c]  # channels of what the way down leaves for the way up
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.input_blocks.append(block(f"in_{len(self.input_blocks)}", c, level))
                c = channels * m
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(c)]))
                skips.append(c)
        self.sites |= {"mid_0": c, "mid_1": c}
        self.middle_block = nn.ModuleList([
            ResBlock(c, c, time_dim),
            attention_layer(c, context_dim, head_channels),
            ResBlock(c, c, time_dim),
        ])
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                site = f"out_{len(self.output_blocks)}"
                self.output_blocks.append(block(site, c + skips.pop(), level))
                c = channels * m
                if level > 0 and i == blocks:
                    self.output_blocks[-1].append(Upsample(c))
        self.out = nn.Sequential(
            GroupNorm(c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1)
        )
        self.to(memory_format=torch.channels_last)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        context: Tensor | None = None,
        extra: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """z (B C H W), t (B,) int64, context (B M D) -> eps (B C H W).

        extra(site, h) -> h of the same shape. ValueError: a context is missing, or not wanted."""
        if context is None and self.context_dim is not None:
            raise ValueError(f"no context was given, but context_dim={self.context_dim}")
        if context is not None and self.context_dim is None:
            raise ValueError("a context was given, but context_dim=None")
        emb = time_embedding(t, self.channels).to(self.time_embed[0].weight)
        emb = self.time_embed(emb)  # B E

        def block(site: str, layers: nn.ModuleList, h: Tensor) -> Tensor:
            def inside(h: Tensor) -> Tensor:
                for layer in layers:
                    h = layer(h, emb, context)
                return extra(site, h) if extra else h

            if self.checkpointing:
                # No block draws random numbers: no random state to keep, which on a GPU waits.
                return checkpoint(inside, h, use_reentrant=False, preserve_rng_state=False)
            return inside(h)

        h = self.input_blocks[0][0](z)
        skips = [h]
        for i, layers in enumerate(self.input_blocks[1:], start=1):
            h = layers[0](h) if isinstance(layers[0], Downsample) else block(f"in_{i}", layers, h)
            skips.append(h)
        h = block("mid_0", self.middle_block[:2], h)
        h = block("mid_1", self.middle_block[2:], h)
        for i, layers in enumerate(self.output_blocks):
            h = torch.cat([h, skips.pop()], dim=1)
            if isinstance(layers[-1], Upsample):  # it belongs to the next level: after the site
                h = layers[-1](block(f"out_{i}", layers[:-1], h))
            else:
                h = block(f"out_{i}", layers, h)
        return self.out(h)

    @classmethod
    def from_checkpoint(
        cls,
        state: dict[str, Tensor],
        prefix: str = "model.diffusion_model.",
        head_channels: int | None = None,
    ) -> "UNet":
        """A float32 U-Net with the sizes and weights of `state`: with its averaged (EMA) weights
        where it has them.

        ValueError: no U-Net under `prefix`, or averaged tensors that belong to none. KeyError or
        RuntimeError: a tensor is missing or left over."""
        weights = averaged_weights(state)
        if not weights:
            weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if "input_blocks.0.0.weight" not in weights:
            raise ValueError(f"no LDM U-Net under {prefix!r}: the keys begin with "
                             f"{sorted(state)[:3]}")
        channels, in_channels = weights["input_blocks.0.0.weight"].shape[:2]
        levels = [[]]  # of each: (width, whether attention follows) of its residual blocks
        i = 1
        while True:
            if f"input_blocks.{i}.0.op.weight" in weights:
                levels.append([])
            elif (conv := f"input_blocks.{i}.0.in_layers.2.weight") in weights:
                attends = f"input_blocks.{i}.1.norm.weight" in weights
                levels[-1].append((len(weights[conv]), attends))
            else:
                break
            i += 1
        to_k = weights.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")  # C D
        with torch.device("meta"):  # no memory and no random numbers for what is replaced at once
            unet = cls(
                in_channels,
                len(weights["out.2.weight"]),
                channels,
                tuple(level[0][0] // channels for level in levels),
                len(levels[0]),
                tuple(level[0][1] for level in levels),
                None if to_k is None else to_k.shape[1],
                head_channels,
            )
        weights = {k: v.float() for k, v in weights.items()}
        unet.load_state_dict(weights, strict=True, assign=True)
        return unet.to(memory_format=torch.channels_last)


def averaged_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The averaged (EMA) weights of an LDM checkpoint under the released names; {} if it has none.

    LDM's LitEma keeps them as `model_ema.` and the parameter's name with every dot removed
    (`model_ema.diffusion_modelout2weight`), beside two numbers that scripts which prune a
    checkpoint leave behind. ValueError: an averaged tensor belongs to nothing in a U-Net."""
    averaged = [key for key in state if key.startswith("model_ema.")
                and key not in ("model_ema.decay", "model_ema.num_updates")]
    if not averaged:
        return {}
    names = {name.replace(".", ""): name for name in possible_names()}
    weights = {}
    for key in averaged:
        without_dots = key.removeprefix("model_ema.diffusion_model")
        if without_dots not in names:
            raise ValueError(f"the averaged tensor {key} belongs to no tensor of a U-Net")
        weights[names[without_dots]] = state[key]
    return weights


def possible_names() -> list[str]:
    """The name of every tensor that a U-Net of up to 100 blocks each way may have."""
    with torch.device("meta"):
        layers = (
            nn.Conv2d(3, 32, 3),
            ResBlock(32, 64, 128),
            AttentionBlock(32, 32),
            SpatialTransformer(32, 16, 32),
            Downsample(32),
            Upsample(32),
        )
    inside = {name for layer in layers for name in layer.state_dict()}
    places = [f"middle_block.{i}" for i in range(3)]
    for i in range(100):
        for j in range(3):
            places += [f"input_blocks.{i}.{j}", f"output_blocks.{i}.{j}"]
    names = [f"{place}.{name}" for place in places for name in inside]
    for place in ("time_embed.0", "time_embed.2", "out.0", "out.2"):
        names += [f"{place}.weight", f"{place}.bias"]
    return names
