"""The first stage of latent diffusion (Rombach et al. 2022; VQGAN, Esser et al. 2021): pictures to latents and back.

    x (B 3 H W) in [-1, 1]  ->  encode  ->  z (B C H/f W/f)  ->  decode  ->  x

Attribute names are the released keys, sizes come from the tensors: VQ-f4 (cin256-v2, celeba256, ffhq256), VQ-f8,
VQ-f16, KL-f4 to KL-f32. Diffusion runs on the latent before quantisation: a VQ encode does not quantise, a VQ decode
does. B batch, C latent channels, f downsampling factor, N = positions, V codes.

Copy this file alone: it needs torch and einops, nothing else of tinyanl. Usage:

    import torch
    from autoencoder import Autoencoder
    model = Autoencoder(channels=32, mult=(1, 2), blocks=1, codes=64)               # Autoencoder() is VQ-f4
    again = Autoencoder.from_checkpoint(model.state_dict(), prefix="")              # sizes come from the tensors
    z = again.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    print(z.shape, again.decode(z).shape)
"""
from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups at every released width; fewer in a narrow one: groups of one channel would erase flat colours."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.norm2 = group_norm(c_in), group_norm(c_out)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over positions, one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))  # B 1 N C
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and below only, as released


class Upsample(nn.Sequential):
    def __init__(self, channels: int):
        super().__init__(OrderedDict(nearest=nn.Upsample(scale_factor=2),
                                     conv=nn.Conv2d(channels, channels, 3, padding=1)))


class Level(nn.Module):
    """One resolution: residual blocks, attention after each where the model has it, a change of resolution."""

    def __init__(self, c_in: int, c_out: int, blocks: int, attention: bool, resample: tuple[str, nn.Module] | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_out if i else c_in, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(blocks if attention else 0))
        if resample:
            self.add_module(*resample)  # "downsample" or "upsample"

    def forward(self, h: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            h = block(h)
            h = self.attn[i](h) if self.attn else h
        for name in ("downsample", "upsample"):
            h = getattr(self, name)(h) if hasattr(self, name) else h
        return h


class Middle(nn.Module):
    def __init__(self, channels: int, attention: bool):
        super().__init__()
        self.block_1, self.block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
        self.attn_1 = AttnBlock(channels) if attention else nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    def __init__(self, channels: int, mult: tuple[int, ...], blocks: int, attention: tuple[bool, ...],
                 mid_attention: bool, z: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down, c = nn.Sequential(), channels
        for i, m in enumerate(mult):
            resample = ("downsample", Downsample(channels * m)) if i < len(mult) - 1 else None
            self.down.append(Level(c, channels * m, blocks, attention[i], resample))
            c = channels * m
        self.mid = Middle(c, mid_attention)
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(self.down(self.conv_in(x))))))


class Decoder(nn.Module):
    def __init__(self, channels: int, mult: tuple[int, ...], blocks: int, attention: tuple[bool, ...],
                 mid_attention: bool, z: int):
        super().__init__()
        c = channels * mult[-1]
        self.conv_in = nn.Conv2d(z, c, 3, padding=1)
        self.mid = Middle(c, mid_attention)
        self.up = nn.ModuleList()
        for i, m in reversed(list(enumerate(mult))):  # computed from the lowest resolution, stored from the highest
            resample = ("upsample", Upsample(channels * m)) if i else None
            self.up.insert(0, Level(c, channels * m, blocks + 1, attention[i], resample))
            c = channels * m
        self.norm_out = group_norm(c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """Replaces each latent vector by the nearest of V codes."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)

    def forward(self, z: Tensor) -> Tensor:
        flat = rearrange(z, "b c h w -> b (h w) c")
        index = torch.stack([torch.cdist(x, self.embedding.weight).argmin(1) for x in flat])  # B N: N x V at a time
        return rearrange(self.embedding(index), "b (h w) c -> b c h w", h=z.shape[2])


class Autoencoder(nn.Module):
    """VQ where `codes` is a number, KL where it is None. Defaults are VQ-f4 of cin256-v2: 55,322,782 parameters."""

    def __init__(self, channels: int = 128, mult: tuple[int, ...] = (1, 2, 4), blocks: int = 2,
                 attention: tuple[bool, ...] = (), mid_attention: bool = True,
                 z_channels: int = 3, embed_dim: int = 3, codes: int | None = 8192):
        super().__init__()
        attention = attention or (False,) * len(mult)
        moments = 1 if codes else 2  # a KL encoder gives mean and log variance
        self.factor = 2 ** (len(mult) - 1)
        self.encoder = Encoder(channels, mult, blocks, attention, mid_attention, moments * z_channels)
        self.decoder = Decoder(channels, mult, blocks, attention, mid_attention, z_channels)
        self.quant_conv = nn.Conv2d(moments * z_channels, moments * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)
        self.quantize = Quantizer(codes, embed_dim) if codes else None

    def encode(self, x: Tensor) -> Tensor:
        """x (B 3 H W) in [-1, 1] -> z (B C H/f W/f): the unquantised latent, of a KL model the mean.

        ValueError where f does not divide H and W."""
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"picture sides {tuple(x.shape[2:])} must be multiples of {self.factor}")
        z = self.quant_conv(self.encoder(x))
        return z if self.quantize else z.chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """z (B C h w) -> x (B 3 f*h f*w), about [-1, 1], not clipped. A VQ model moves z to the nearest codes first."""
        z = self.quantize(z) if self.quantize else z
        return self.decoder(self.post_quant_conv(z))

    @classmethod
    def from_checkpoint(cls, state: dict[str, Tensor], prefix: str = "first_stage_model.") -> "Autoencoder":
        """A float32 autoencoder with the sizes and weights of `state`. A first stage published alone has prefix "".

        `loss.*` (the discriminator it was trained with) is left out. Raises ValueError where there is no autoencoder
        under `prefix`, RuntimeError where a tensor is missing or left over."""
        own = {k.removeprefix(prefix): v.float() for k, v in state.items()
               if k.startswith(prefix) and not k.startswith(prefix + "loss.")}
        if "encoder.conv_in.weight" not in own:
            raise ValueError(f"no LDM autoencoder under {prefix!r}: the keys begin with {sorted(state)[:3]}")
        channels = len(own["encoder.conv_in.weight"])

        def count(pattern: str) -> int:
            return next(i for i in range(99) if pattern.format(i) not in own)

        levels = range(count("encoder.down.{}.block.0.conv1.weight"))
        with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
            model = cls(channels, tuple(len(own[f"encoder.down.{i}.block.0.conv1.weight"]) // channels for i in levels),
                        blocks=count("encoder.down.0.block.{}.conv1.weight"),
                        attention=tuple(f"encoder.down.{i}.attn.0.q.weight" in own for i in levels),
                        mid_attention="encoder.mid.attn_1.q.weight" in own,
                        z_channels=own["decoder.conv_in.weight"].shape[1],
                        embed_dim=own["post_quant_conv.weight"].shape[1],
                        codes=len(own["quantize.embedding.weight"]) if "quantize.embedding.weight" in own else None)
        model.load_state_dict(own, strict=True, assign=True)
        return model
