"""The U-Net of latent diffusion (Rombach et al. 2022), built from a released checkpoint's own tensors.

Attribute names are the released keys, so a checkpoint loads with strict=True and nothing is converted. Two kinds:
with a context (cin256-v2: a SpatialTransformer per block) and without one (celeba256, ffhq256: an AttentionBlock).
`extra(site, h)` is called at the end of every residual block: anything may be inserted there, and the state dict
stays the released one. B batch, C channels, H W sides, N = H*W positions, M context tokens, G heads, E = 4*channels.

Copy this file alone: it needs torch and einops, nothing else of tinyanl. Usage:

    import torch
    from unet import UNet
    unet = UNet(channels=32, mult=(1, 2), attention=(False, True), context_dim=16)   # UNet() is cin256-v2
    eps = unet(torch.randn(2, 3, 16, 16), torch.tensor([10, 999]), context=torch.randn(2, 1, 16))
    again = UNet.from_checkpoint(unet.state_dict(), prefix="")                        # sizes come from the tensors
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


class GroupNorm(nn.GroupNorm):
    """32 groups at every released width. Fewer in a narrow model: a group of one channel would subtract exactly the
    constant that the time embedding has just added to that channel, and the block would not know the time.
    Convolutions are fastest with channels last in memory, this is not, on a CPU: it gets them first, in a copy."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(min(32, channels // 4), channels, eps=eps)

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h.contiguous()).contiguous(memory_format=torch.channels_last)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the timestep, cosines first.  t (B,) -> (B dim)."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class ResBlock(nn.Module):
    """Two convolutions with the time embedding added between them, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, time_dim: int):
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, c_out))
        self.out_layers = nn.Sequential(GroupNorm(c_out), nn.SiLU(),
                                        nn.Identity(),  # the released model's dropout of 0: keeps the next key
                                        nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = self.in_layers(h) + self.emb_layers(emb)[:, :, None, None]  # B C H W
        return self.skip_connection(h) + self.out_layers(x)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """q (B N C), k and v (B M C) -> (B N C)."""
    if heads == 1:  # as wide as the block: flash attention has no such heads on a GPU, and slow gradients on a CPU
        return (q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)).softmax(dim=-1) @ v
    q, k, v = (rearrange(x, "b n (g d) -> b g n d", g=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b g n d -> b n (g d)")


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
        return h + self.proj_out(attend(q, k, v, self.heads).transpose(1, 2)).view_as(h)


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
        return self.to_out(attend(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class FeedForward(nn.Module):
    """GEGLU: one half of a linear map gates the other, and a second map leads back."""

    def __init__(self, channels: int):
        super().__init__()
        proj, back = nn.Linear(channels, 8 * channels), nn.Linear(4 * channels, channels)
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
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        if context.shape[1] == 1:  # softmax over one key is 1, whatever the query: a bias, and exactly that
            x = x + self.attn2.to_out(self.attn2.to_v(context))
        else:
            x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A TransformerBlock over positions, between two 1x1 convolutions."""

    def __init__(self, channels: int, context_dim: int, head_channels: int):
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_dim, channels // head_channels)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, h: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        x = rearrange(self.proj_in(self.norm(h)), "b c h w -> b (h w) c")  # B N C
        x = self.transformer_blocks[0](x, context)
        return h + self.proj_out(rearrange(x, "b (h w) c -> b c h w", h=h.shape[2]))


class Downsample(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(OrderedDict(op=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


class Upsample(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(OrderedDict(nearest=nn.Upsample(scale_factor=2),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


class UNet(nn.Module):
    """The denoiser eps(z_t, t, context). Defaults are cin256-v2: 400,920,579 parameters in 688 tensors.

    `attention[i]`: level i has attention. `head_channels`: None is one head as wide as its block (cin256-v2);
    celeba256 and ffhq256 have 32. `sites`: site name -> channels, one per residual block, in order of use."""

    def __init__(self, in_channels: int = 3, out_channels: int = 3, channels: int = 192,
                 mult: tuple[int, ...] = (1, 2, 3, 5), blocks: int = 2,
                 attention: tuple[bool, ...] = (False, True, True, True),
                 context_dim: int | None = 512, head_channels: int | None = None):
        super().__init__()
        self.in_channels, self.channels, self.context_dim = in_channels, channels, context_dim
        self.checkpointing = False  # keep no activations inside a block, recompute them in the backward pass
        time_dim, self.sites = 4 * channels, {}

        def attention_layer(c: int) -> nn.Module:
            width = head_channels or c
            if c % width:
                raise ValueError(f"head_channels={width} does not divide a block of {c} channels")
            return AttentionBlock(c, width) if context_dim is None else SpatialTransformer(c, context_dim, width)

        def block(c_in: int, c_out: int, level: int) -> nn.ModuleList:
            then = [attention_layer(c_out)] if attention[level] else []
            return nn.ModuleList([ResBlock(c_in, c_out, time_dim), *then])

        self.time_embed = nn.Sequential(nn.Linear(channels, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        c, skips = channels, [channels]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                self.sites[f"in_{len(self.input_blocks)}"] = channels * m
                self.input_blocks.append(block(c, channels * m, level))
                c = channels * m
                skips.append(c)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(c)]))
                skips.append(c)
        self.sites |= {"mid_0": c, "mid_1": c}
        self.middle_block = nn.ModuleList([ResBlock(c, c, time_dim), attention_layer(c), ResBlock(c, c, time_dim)])
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                self.sites[f"out_{len(self.output_blocks)}"] = channels * m
                self.output_blocks.append(block(c + skips.pop(), channels * m, level))
                c = channels * m
                if level and i == blocks:
                    self.output_blocks[-1].append(Upsample(c))
        self.out = nn.Sequential(GroupNorm(c), nn.SiLU(), nn.Conv2d(c, out_channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)

    def forward(self, z: Tensor, t: Tensor, context: Tensor | None = None,
                extra: Callable[[str, Tensor], Tensor] | None = None) -> Tensor:
        """z (B C H W), t (B,) int64, context (B M D) -> eps (B C H W).  extra(site, h) -> h of the same shape."""
        if (context is None) != (self.context_dim is None):
            has = "no context was given" if context is None else "a context was given"
            raise ValueError(f"{has}, but context_dim={self.context_dim}")
        extra = extra or (lambda site, h: h)
        emb = self.time_embed(time_embedding(t, self.channels).to(self.time_embed[0].weight))  # B E

        def block(site: str, layers: nn.ModuleList, h: Tensor) -> Tensor:
            def inside(h: Tensor) -> Tensor:
                for layer in layers:
                    h = layer(h, emb, context)
                return extra(site, h)

            return checkpoint(inside, h, use_reentrant=False) if self.checkpointing else inside(h)

        skips = [self.input_blocks[0][0](z)]
        for i, layers in enumerate(self.input_blocks[1:], start=1):
            down = isinstance(layers[0], Downsample)
            skips.append(layers[0](skips[-1]) if down else block(f"in_{i}", layers, skips[-1]))
        h = block("mid_0", self.middle_block[:2], skips[-1])
        h = block("mid_1", self.middle_block[2:], h)
        for i, layers in enumerate(self.output_blocks):
            up = isinstance(layers[-1], Upsample)  # belongs to the next level: after the site
            h = block(f"out_{i}", layers[:-1] if up else layers, torch.cat([h, skips.pop()], dim=1))
            h = layers[-1](h) if up else h
        return self.out(h)

    @classmethod
    def from_checkpoint(cls, state: dict[str, Tensor], prefix: str = "model.diffusion_model.",
                        head_channels: int | None = None) -> "UNet":
        """A float32 U-Net with the sizes and weights of `state`, its averaged (EMA) weights where it has them.

        ValueError: no U-Net under `prefix`, or averaged tensors left over. KeyError or RuntimeError: a tensor is
        missing, or an ordinary one left over."""
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if "input_blocks.0.0.weight" not in own:
            raise ValueError(f"no LDM U-Net under {prefix!r}: the keys begin with {sorted(state)[:3]}")
        if any(k.startswith("model_ema.") for k in state):  # LitEma strips the dots from a parameter's name
            names = {k: "model_ema." + (prefix.removeprefix("model.") + k).replace(".", "") for k in own}
            known = {*names.values(), "model_ema.decay", "model_ema.num_updates"}
            if surplus := {k for k in state if k.startswith("model_ema.")} - known:
                raise ValueError(f"averaged tensors that belong to no tensor of the U-Net: {sorted(surplus)[:3]}")
            own = {k: state[name] for k, name in names.items()}
        channels, in_channels = own["input_blocks.0.0.weight"].shape[:2]
        mult, attention, i = [[]], [[]], 1
        while f"input_blocks.{i}.0.in_layers.2.weight" in own or f"input_blocks.{i}.0.op.weight" in own:
            if f"input_blocks.{i}.0.op.weight" in own:
                mult.append([]), attention.append([])
            else:
                mult[-1].append(len(own[f"input_blocks.{i}.0.in_layers.2.weight"]) // channels)
                attention[-1].append(f"input_blocks.{i}.1.norm.weight" in own)
            i += 1
        context = own.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
        with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
            unet = cls(in_channels, len(own["out.2.weight"]), channels, tuple(m[0] for m in mult), len(mult[0]),
                       tuple(a[0] for a in attention), None if context is None else context.shape[1], head_channels)
        unet.load_state_dict({k: v.float() for k, v in own.items()}, strict=True, assign=True)
        return unet.to(memory_format=torch.channels_last)
