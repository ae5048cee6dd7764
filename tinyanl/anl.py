"""Attention-NonLinear (ANL), the modules that tinyanl trains (You & Zhao, "Transferring Pretrained
Diffusion Probabilistic Models").

    h (B C H W), cond_tokens (B K D)  ->  h + attend(h, cond_tokens), then  h + mlp(h)

An ANL stands after a residual block of a frozen U-Net: cross-attention to the condition, then a
non-linear mapping (a GEGLU feed-forward). Its last layers start at zero, so a fresh one is the
identity and training starts from the pretrained model, bit for bit. Our readings, where the paper
is silent: the zero start, the kind of feed-forward, K tokens cut from one CLIP embedding by a
linear map that all sites share. A softmax over one key is 1, so attention to a single token is a
learned bias: at K = 1 there are no queries and keys at all.
B batch, C channels, N = H*W positions, K condition tokens, D condition width, G heads.

Copy this file alone: it needs torch and einops, nothing else of tinyanl. Usage:

    import torch
    from anl import ANLs
    sites = {"in_1": 64, "mid_0": 128}                 # of a U-Net: unet.sites
    anls = ANLs(sites, cond_dim=512, tokens=4)
    extra = anls.bind(torch.randn(2, 512))             # once per condition, used at every step
    h = torch.randn(2, 64, 8, 8)
    print(torch.equal(extra("in_1", h), h))            # True: a fresh ANL changes nothing
"""
from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

HEAD = 32  # channels a head: 2 heads at 64 channels, 30 at 960


class ANL(nn.Module):
    """Cross-attention to K condition tokens, then a GEGLU feed-forward `ratio` times as wide.

    It is the identity at the start. ValueError where the channels cannot be split into heads."""

    def __init__(self, channels: int, cond_dim: int, tokens: int = 1, ratio: int = 4):
        super().__init__()
        self.heads = max(1, channels // HEAD)
        if channels % self.heads:
            raise ValueError(f"channels={channels} is not a multiple of the {self.heads} heads")
        if tokens > 1:
            self.norm_q = nn.LayerNorm(channels)
            self.to_q = nn.Linear(channels, channels, bias=False)
            self.to_k = nn.Linear(cond_dim, channels, bias=False)
        self.tokens = tokens
        self.to_v = nn.Linear(cond_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        self.norm_mlp = nn.LayerNorm(channels)
        self.to_hidden = nn.Linear(channels, 2 * ratio * channels)
        self.from_hidden = nn.Linear(ratio * channels, channels)
        # A fresh block must not move the frozen model's output.
        for last in (self.to_out, self.from_hidden):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def bind(self, cond_tokens: Tensor) -> tuple[Tensor, ...]:
        """What depends on the condition alone: keys and values, or at K = 1 the finished bias.

        cond_tokens (B K D)."""
        v = self.to_v(cond_tokens)  # B K C
        if self.tokens == 1:
            return (self.to_out(v),)  # B 1 C
        k = self.to_k(cond_tokens)  # B K C
        k = rearrange(k, "b k (g d) -> b g k d", g=self.heads)
        v = rearrange(v, "b k (g d) -> b g k d", g=self.heads)
        return k, v

    def apply_to(self, h: Tensor, bound: tuple[Tensor, ...]) -> Tensor:
        """h (B C H W) and what bind() gave -> h of the same shape."""
        x = rearrange(h, "b c h w -> b (h w) c")  # B N C
        if self.tokens == 1:
            x = x + bound[0]
        else:
            q = self.to_q(self.norm_q(x))  # B N C
            q = rearrange(q, "b n (g d) -> b g n d", g=self.heads)
            attended = F.scaled_dot_product_attention(q, *bound)
            x = x + self.to_out(rearrange(attended, "b g n d -> b n (g d)"))
        value, gate = self.to_hidden(self.norm_mlp(x)).chunk(2, dim=-1)  # B N ratio*C
        x = x + self.from_hidden(value * F.gelu(gate))
        return rearrange(x, "b (h w) c -> b c h w", h=h.shape[2])

    def forward(self, h: Tensor, cond_tokens: Tensor) -> Tensor:
        """h (B C H W), cond_tokens (B K D) -> (B C H W)."""
        return self.apply_to(h, self.bind(cond_tokens))


class ANLs(nn.Module):
    """One ANL per site of a U-Net, and the linear map from a condition to K tokens that they share.

    sites: site name -> channels, as unet.sites. On cin256-v2 the blocks have 124.0M parameters at
    K = 1 and 139.4M at K > 1, where the shared map adds 0.3M a token."""

    def __init__(self, sites: dict[str, int], cond_dim: int, tokens: int = 1, ratio: int = 4):
        super().__init__()
        self.tokens = tokens
        self.to_tokens = nn.Linear(cond_dim, tokens * cond_dim) if tokens > 1 else nn.Identity()
        self.blocks = nn.ModuleDict({
            site: ANL(channels, cond_dim, tokens, ratio) for site, channels in sites.items()
        })

    def bind(self, cond: Tensor) -> Callable[[str, Tensor], Tensor]:
        """cond (B D) -> extra(site, h), for unet(z, t, context, extra).

        What depends on cond alone is computed here, once."""
        cond_tokens = rearrange(self.to_tokens(cond), "b (k d) -> b k d", k=self.tokens)  # B K D
        bound = {site: anl.bind(cond_tokens) for site, anl in self.blocks.items()}

        def extra(site: str, h: Tensor) -> Tensor:
            return self.blocks[site].apply_to(h, bound[site])

        return extra
