"""The image tokenizer: one conv autoencoder that serves both a diffusion and an autoregressive generator.

    x (B,3,H,W) in [-1, 1] --Encoder, quant_conv--> pre (B,d,h,w) --bottleneck--> z (B,d,h,w) and indices (B,h,w)
    z --post_quant_conv, Decoder--> reconstruction (B,3,H,W)

Because iFSQ's z lies on a finite grid, the integers `indices` *are* the latents: LlamaGen models the integers, DiT models
z = indices_to_codes(integers), and the same `decode` turns either back into pixels (arXiv 2601.17124, section 3).

Five bottlenecks share the body, so that they can be compared: `ifsq` and `fsq` (fsq.py), `vq` (a learned codebook, van den
Oord et al. 2017), `vae` (a Gaussian posterior, Kingma & Welling 2014) and `ae` (nothing at all). The losses that train it
follow VQGAN (Esser et al. 2021): L1 + LPIPS (Zhang et al. 2018), later a PatchGAN critic. Layer and parameter names are
those of Tencent-Hunyuan/iFSQ, so that its checkpoints load with strict=True.

Letters: B batch, C channels, H W pixels, h w latent grid (H/h = the downsampling factor), d latent dims.

    import torch
    from tokenizer import Tokenizer
    tokenizer = Tokenizer("ifsq", levels=[17] * 4, hidden=32, multipliers=[1, 2, 2])  # 2 halvings: 4x down
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    z, indices = tokenizer.encode(x)                          # (1, 4, 8, 8), (1, 8, 8)
    assert torch.allclose(tokenizer.decode_indices(indices), tokenizer.decode(z), atol=1e-5)
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from fsq import FSQ

QUANTIZERS = ("ifsq", "fsq", "vq", "vae", "ae")

# ------------------------------------------------------------------------------------------------ encoder and decoder


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B,C_in,H,W) -> (B,C_out,H,W): two 3x3 convolutions on the normalised input, added to it."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """(B,C,H,W) -> (B,C,H,W): one head of self-attention over the H*W positions. The paper's tokenizer uses none."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                                     # (B, H*W, C)
        h = F.scaled_dot_product_attention(*(f(h)[:, None] for f in (self.q, self.k, self.v)))[:, 0]
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[2:])           # (B, C, H, W)


class Downsample(nn.Module):
    """(B,C,H,W) -> (B,C,H/2,W/2)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as in VQGAN


class Upsample(nn.Module):
    """(B,C,H,W) -> (B,C,2H,2W)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention if asked for, then a change of size."""

    def __init__(self, c_in, c_out, num_blocks, attention, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out) for _ in range(num_blocks if attention else 0))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """(B,3,H,W) -> (B, 2*z_channels, h, w), h = H / 2^(levels - 1)."""

    def __init__(self, hidden, multipliers, num_res_blocks, attn_levels, z_channels):
        super().__init__()
        widths = [hidden * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, hidden, 3, padding=1)
        self.down = nn.ModuleList(
            Level(widths[i - 1] if i else hidden, widths[i], num_res_blocks, i in attn_levels, downsample=i < last)
            for i in range(len(widths)))
        self.mid_block = nn.Sequential(*(ResnetBlock(widths[-1], widths[-1]) for _ in range(num_res_blocks)))
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)  # a VAE's mean and log-variance; kept by all

    def forward(self, x):
        h = self.conv_in(x)                                                             # (B, hidden, H, W)
        for level in self.down:
            h = level(h)                                                                # (B, hidden*m_i, H/2^i, W/2^i)
        return self.conv_out(F.silu(self.norm_out(self.mid_block(h))))                  # (B, 2*z_channels, h, w)


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B,3,H,W): the encoder mirrored, with one residual block more per resolution."""

    def __init__(self, hidden, multipliers, num_res_blocks, attn_levels, z_channels):
        super().__init__()
        widths = [hidden * m for m in multipliers]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid_block = nn.Sequential(*(ResnetBlock(widths[-1], widths[-1]) for _ in range(num_res_blocks)))
        self.up = nn.ModuleList(
            Level(widths[min(i + 1, last)], widths[i], num_res_blocks + 1, i in attn_levels, upsample=i > 0)
            for i in range(len(widths)))
        self.norm_out = norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))                                             # (B, hidden*m_last, h, w)
        for level in reversed(self.up):
            h = level(h)                                                                # (B, hidden*m_i, H/2^i, W/2^i)
        return self.conv_out(F.silu(self.norm_out(h)))                                  # (B, 3, H, W)


# ------------------------------------------------------------------------------------------------ bottlenecks
# Each maps pre (B,c,h,w) fp32, the output of quant_conv, to (z, indices, loss): the latent (B,d,h,w) that the decoder sees,
# one int64 per position (B,h,w) or None, and a scalar to add to the training loss.


class Bottleneck(nn.Module):
    """The continuous autoencoder, and the running statistics that it shares with the quantizers below.

    As in the public code, the mean and variance of `pre` are tracked (momentum 0.1) and saved but never used: they show at
    a glance whether the latents stay near the N(0, 1) that iFSQ assumes.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, dim, 1, 1))
        self.register_buffer("running_var", torch.ones(1, dim, 1, 1))

    def track(self, pre):
        if self.training:
            with torch.no_grad():
                var, mean = torch.var_mean(pre, (0, 2, 3), correction=0, keepdim=True)
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(var, 0.1)

    def forward(self, pre):
        self.track(pre)
        return pre, None, pre.new_zeros(())


class ScalarQuantizer(Bottleneck):
    """FSQ and iFSQ: see fsq.py. No loss of its own, nothing to learn."""

    def __init__(self, levels, alpha, edges):
        super().__init__(len(levels))
        self.fsq = FSQ(levels, alpha, edges)

    def forward(self, pre):
        self.track(pre)
        z, indices = self.fsq(pre.movedim(1, -1))                                       # (B,h,w,d), (B,h,w)
        return z.movedim(-1, 1), indices, pre.new_zeros(())

    def codes(self, indices):
        """(B,h,w) int64 -> (B,d,h,w)."""
        return self.fsq.indices_to_codes(indices).movedim(-1, 1)


class VectorQuantizer(Bottleneck):
    """VQ-VAE: the nearest of n learned vectors. `beta` weighs the codebook term and the commitment term has weight 1.

    Other code does it the other way round; this is VQGAN's "legacy" loss, which the public iFSQ code trains with.
    """

    def __init__(self, dim, codebook_size, beta):
        super().__init__(dim)
        self.beta = beta
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, pre):
        self.track(pre)
        x = pre.movedim(1, -1)                                                          # (B,h,w,d)
        # |x - e|^2 without its |x|^2, which is the same for all e; by parts, since (B*h*w, n) floats can fill the memory
        e = self.embedding.weight.float()
        parts = x.detach().reshape(-1, e.shape[1]).split(max(1, 2**24 // len(e)))
        indices = torch.cat([torch.addmm(e.square().sum(1), part, e.T, alpha=-2).argmin(1) for part in parts])
        indices = indices.view(x.shape[:-1])                                            # (B,h,w)
        q = self.embedding(indices).float()                                             # (B,h,w,d)
        loss = F.mse_loss(x, q.detach()) + self.beta * F.mse_loss(q, x.detach())
        return (q.detach() + (x - x.detach())).movedim(-1, 1), indices, loss            # straight-through

    def codes(self, indices):
        """(B,h,w) int64 -> (B,d,h,w)."""
        return self.embedding(indices).movedim(-1, 1)


class DiagonalGaussian(nn.Module):
    """VAE: pre (B,2d,h,w) holds mean and log-variance. z is a draw in training and the mean in evaluation."""

    def forward(self, pre):
        mean, logvar = self.moments(pre)
        z = mean + (logvar / 2).exp() * torch.randn_like(mean) if self.training else mean
        return z, None, self.kl(mean, logvar).mean()

    @staticmethod
    def moments(pre):
        """(B,2d,h,w) -> mean and log-variance, (B,d,h,w) each."""
        mean, logvar = pre.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    @staticmethod
    def kl(mean, logvar):
        """KL(N(mean, e^logvar) || N(0, 1)), nats, summed over the latent: (B,)."""
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))


class Tokenizer(nn.Module):
    """Encoder, bottleneck, decoder.

    quantizer:      one of QUANTIZERS
    levels:         code values per latent channel; d = len(levels) for every bottleneck
    alpha:          the sigmoid's slope of ifsq and fsq, by default 1.6 and 2.0; fsq.py has the story
    edges:          "half" (the paper), "full" or "original"; see fsq.py
    hidden, multipliers, num_res_blocks: widths hidden*m at each resolution, len(multipliers) - 1 halvings
    attn_levels:    indices of the resolutions (0 = full) that get attention
    z_channels:     channels between the two 1x1 convolutions and the body; by default d
    num_groups:     of every GroupNorm; 32 as in the paper. Narrow layers want fewer: 32 groups of 32 channels are an
                    instance norm, which takes from each channel how bright and how rich in contrast the image is
    codebook_size, beta: of vq; the size is by default the product of the levels, so that it spends the same bits
    Raises ValueError for values that do not fit together.
    """

    def __init__(self, quantizer="ifsq", levels=(17, 17, 17, 17), alpha=None, edges="half", hidden=128,
                 multipliers=(1, 1, 2, 4, 4), num_res_blocks=2, attn_levels=(), z_channels=None, num_groups=32,
                 codebook_size=None, beta=0.25):
        super().__init__()
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, not {quantizer!r}")
        if any(hidden * m % math.lcm(32, num_groups) for m in multipliers):
            raise ValueError("hidden * multipliers must be multiples of 32 (for GroupNorm), "
                             f"got {[hidden * m for m in multipliers]}")
        d = len(levels)
        z_channels = z_channels or d
        self.quantizer, self.levels, self.downsample = quantizer, list(levels), 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(hidden, multipliers, num_res_blocks, attn_levels, z_channels)
        self.decoder = Decoder(hidden, multipliers, num_res_blocks, attn_levels, z_channels)
        for layer in self.modules():
            if isinstance(layer, nn.GroupNorm):
                layer.num_groups = num_groups  # set here, not handed down to every block: no weight depends on it
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * d if quantizer == "vae" else d, 1)
        self.post_quant_conv = nn.Conv2d(d, z_channels, 1)
        if quantizer in ("ifsq", "fsq"):
            alpha = alpha or {"ifsq": 1.6, "fsq": 2.0}[quantizer]
            self.quantize = ScalarQuantizer(levels, alpha, edges)
        elif quantizer == "vq":
            self.levels = [codebook_size or math.prod(levels)]  # one digit per token
            if self.levels[0] > 2**24:
                raise ValueError(f"a learned codebook of {self.levels[0]} vectors is too large: "
                                 "give codebook_size or smaller levels")
            self.quantize = VectorQuantizer(d, self.levels[0], beta)
        else:
            self.quantize = DiagonalGaussian() if quantizer == "vae" else Bottleneck(d)

    @property
    def discrete(self):
        """Whether `encode` yields indices: without them there is nothing for an AR model to predict."""
        return self.quantizer in ("ifsq", "fsq", "vq")

    def bottleneck(self, x):
        """x (B,3,H,W) in [-1, 1] -> (z (B,d,h,w), indices (B,h,w) int64 or None, scalar loss), z in fp32.

        Raises ValueError if H or W is not a multiple of the downsampling factor.
        """
        if x.shape[2] % self.downsample or x.shape[3] % self.downsample:
            raise ValueError(f"image height and width must be multiples of {self.downsample}, got {x.shape[2]} x {x.shape[3]}")
        moments = self.encoder(x)                                                       # (B, 2*z_channels, h, w)
        with torch.autocast(x.device.type, enabled=False):  # the last layer and all after it in fp32: see fsq.bound
            return self.quantize(self.quant_conv(moments.float()))

    def encode(self, x):
        """x (B,3,H,W) in [-1, 1] -> z (B,d,h,w), in [-1, 1] for ifsq and fsq, and indices (B,h,w) int64 or None."""
        return self.bottleneck(x)[:2]

    def decode(self, z):
        """z (B,d,h,w) -> reconstruction (B,3,H,W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def decode_indices(self, indices):
        """indices (B,h,w) int64 -> reconstruction (B,3,H,W). Raises ValueError for vae and ae, which have none."""
        if not self.discrete:
            raise ValueError(f"a {self.quantizer} tokenizer has continuous latents and no indices: use decode(z)")
        return self.decode(self.quantize.codes(indices))

    def forward(self, x):
        """x (B,3,H,W) in [-1, 1] -> (reconstruction (B,3,H,W), indices (B,h,w) or None, the bottleneck's scalar loss)."""
        z, indices, loss = self.bottleneck(x)
        return self.decode(z), indices, loss

    def bits_per_image(self, height, width):
        """h*w*sum(log2 L): what the tokens of one image cost, uncompressed. 16 bits a latent value for vae and ae."""
        bits = sum(math.log2(level) for level in self.levels) if self.discrete else 16 * len(self.levels)
        return height // self.downsample * (width // self.downsample) * bits


# ------------------------------------------------------------------------------------------------ losses


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924), version 0.1: "vgg" to train with, "alex" to report.

    backbone: state dict of torchvision's vgg16 or alexnet; heads: the five published 1x1 heads, `linK.model.1.weight`.
    Both are frozen. Raises KeyError or RuntimeError if a state dict is not the one named.
    """

    TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # the ReLUs whose outputs are compared

    def __init__(self, net, backbone, heads):
        super().__init__()
        from torchvision import models  # here, since importing it takes a second that other users of this file need not pay
        with torch.device("meta"):  # no memory and no initialisation for weights that are replaced in the next line
            features = (models.vgg16 if net == "vgg" else models.alexnet)(weights=None).features
        weights = {k.removeprefix("features."): v for k, v in backbone.items() if k.startswith("features.")}
        features.load_state_dict(weights, assign=True)
        self.taps = self.TAPS[net]
        self.features = features[: self.taps[-1] + 1].eval().requires_grad_(False)
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # its output is compared, and its input may be one too
        for i in range(len(self.taps)):
            self.register_buffer(f"head{i}", heads[f"lin{i}.model.1.weight"].clone())
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, x, y):
        """x, y (B,3,H,W) in [-1, 1], at least 16 px (vgg) or 31 px (alex) a side -> distance (B,), 0 for equal images."""
        hx, hy, total = (x - self.shift) / self.scale, (y - self.shift) / self.scale, 0
        for i, layer in enumerate(self.features):
            hx, hy = layer(hx), layer(hy)
            if i in self.taps:
                difference = (self._unit(hx) - self._unit(hy)).square()                 # (B, C_i, H_i, W_i)
                head = getattr(self, f"head{self.taps.index(i)}")                       # (1, C_i, 1, 1)
                total = total + (difference * head).sum(1).mean((1, 2))
        return total

    @staticmethod
    def _unit(h):
        h = h.float()
        return h / (h.norm(dim=1, keepdim=True) + 1e-10)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) as in VQGAN: (B,3,H,W) in [-1, 1] -> one logit per overlapping patch (B,1,h',w').

    With n_layers = 4 a side of less than 48 px leaves no logit; 3 layers do down to 24 px.
    """

    def __init__(self, ndf=64, n_layers=4):
        super().__init__()
        layers, c = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)], ndf
        for i in range(1, n_layers + 1):
            c_out = ndf * min(2**i, 8)
            layers += [nn.Conv2d(c, c_out, 4, 2 if i < n_layers else 1, 1, bias=False), nn.BatchNorm2d(c_out),
                       nn.LeakyReLU(0.2)]
            c = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x)


def reconstruction_loss(x, reconstruction, lpips=None, perceptual_weight=0.0):
    """L1 + perceptual_weight * LPIPS, in fp32. x, reconstruction (B,3,H,W) -> (scalar to minimise, dict of its parts)."""
    parts = {"l1": F.l1_loss(reconstruction.float(), x.float())}
    if lpips is not None:
        parts["lpips"] = lpips(x, reconstruction).mean()
    return parts["l1"] + perceptual_weight * parts.get("lpips", 0.0), parts


def discriminator_loss(logits_real, logits_fake):
    """Hinge loss: zero once real patches score above 1 and fake ones below -1."""
    return (F.relu(1 - logits_real.float()).mean() + F.relu(1 + logits_fake.float()).mean()) / 2


def adaptive_weight(reconstruction_loss, generator_loss, last_weight, limit=1e6):
    """VQGAN eq. 7: the weight that gives both losses the same pull on the decoder's last layer, clamped to [0, limit].

    Returns a detached scalar. It is logged: a weight at its limit, or falling to 0, is how a GAN start goes wrong.
    """
    pull, = torch.autograd.grad(reconstruction_loss, last_weight, retain_graph=True)
    push, = torch.autograd.grad(generator_loss, last_weight, retain_graph=True)
    return (pull.float().norm() / (push.float().norm() + 1e-6)).clamp(0, limit).detach()


def adversarial_loss(reconstruction, base_loss, discriminator, last_weight, weight=0.5):
    """The generator's share of the game: (weight * adaptive weight * -mean logit, the logit loss, the adaptive weight).

    The discriminator's parameters take no gradient from it, so that its own step starts clean.
    """
    discriminator.requires_grad_(False)
    g_loss = -discriminator(reconstruction).float().mean()
    discriminator.requires_grad_(True)
    d_weight = adaptive_weight(base_loss, g_loss, last_weight)
    return weight * d_weight * g_loss, g_loss.detach(), d_weight


def psnr(x, y):
    """Peak signal-to-noise ratio, dB: x, y (B,3,H,W) in [0, 1] -> (B,), at most 100, so that equal images spoil no mean."""
    return -10 * (x - y).square().mean((1, 2, 3)).clamp(min=1e-10).log10()
