"""The image tokenizer: one conv autoencoder that serves diffusion and autoregressive generators.

    x (B,3,H,W) in [-1, 1] --Encoder, quant_conv--> pre (B,d,h,w)
    pre --bottleneck--> z (B,d,h,w) and indices (B,h,w)
    z --post_quant_conv, Decoder--> reconstruction (B,3,H,W)

(fsq.py knows only the bottleneck: what it calls z is `pre` here, and its z_q is z here.)

Because iFSQ's z lies on a finite grid, the integers `indices` *are* the latents: LlamaGen models
the integers, DiT models z = latents_of(indices), and the same `decode` turns either back into
pixels (arXiv 2601.17124, section 3).

Five bottlenecks share the body, so that they can be compared: `ifsq` and `fsq` (fsq.py), `vq` (a
learned codebook, van den Oord et al. 2017), `vae` (a Gaussian posterior, Kingma & Welling 2014)
and `ae` (nothing at all). The losses follow VQGAN (Esser et al. 2021): L1 and LPIPS (Zhang et al.
2018), later a PatchGAN discriminator. Layers and parameters have the names of Tencent-Hunyuan/iFSQ,
so that its checkpoints load with strict=True.

Letters: B batch, C channels, H W pixels, h w latent grid, d latent channels.

    import torch
    from tokenizer import Tokenizer
    tokenizer = Tokenizer("ifsq", levels=[17] * 4, hidden=32, multipliers=[1, 2, 2],  # 4x down
                          num_groups=8)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    z, indices = tokenizer.encode(x)                          # (1, 4, 8, 8), (1, 8, 8)
    assert torch.allclose(tokenizer.decode_indices(indices), tokenizer.decode(z), atol=1e-5)
"""
import hashlib
import math
import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fsq import FSQ

QUANTIZERS = ("ifsq", "fsq", "vq", "vae", "ae")
SLOPES = {"ifsq": 1.6, "fsq": 2.0}  # alpha of the scalar quantizers

# ------------------------------------------------------------------------------ encoder and decoder


def norm(channels, num_groups):
    return nn.GroupNorm(num_groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B,C_in,H,W) -> (B,C_out,H,W): two normalised 3x3 convolutions, added to their input."""

    def __init__(self, c_in, c_out, num_groups):
        super().__init__()
        self.norm1 = norm(c_in, num_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, num_groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """(B,C,H,W) -> (B,C,H,W): self-attention over the positions. The paper uses none."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.norm = norm(channels, num_groups)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)                        # (B, H*W, C)
        h = F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))
        h = self.proj_out(h).transpose(1, 2)                               # (B, C, H*W)
        return x + h.unflatten(2, x.shape[2:])


def downsample(channels):
    """(B,C,H,W) -> (B,C,H/2,W/2), padded on the right and below only, as in VQGAN."""
    conv = nn.Conv2d(channels, channels, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def upsample(channels):
    """(B,C,H,W) -> (B,C,2H,2W)."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=conv))


def mid_block(channels, num_blocks, num_groups):
    return nn.Sequential(*(ResnetBlock(channels, channels, num_groups) for _ in range(num_blocks)))


class Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention if there is any."""

    def __init__(self, c_in, c_out, num_blocks, attention, num_groups):
        super().__init__()
        self.block = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResnetBlock(c_out if i else c_in, c_out, num_groups))
            self.attn.append(AttnBlock(c_out, num_groups) if attention else nn.Identity())
        self.downsample = nn.Identity()  # the encoder and the decoder each replace one of the two
        self.upsample = nn.Identity()

    def forward(self, x):
        for block, attn in zip(self.block, self.attn):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """(B,3,H,W) -> (B, 2*z_channels, h, w), h = H / 2^(len(multipliers) - 1)."""

    def __init__(self, hidden, multipliers, num_res_blocks, attn_levels, z_channels, num_groups):
        super().__init__()
        self.conv_in = nn.Conv2d(3, hidden, 3, padding=1)
        self.down = nn.ModuleList()
        width = hidden
        for i, multiplier in enumerate(multipliers):
            c_in, width = width, hidden * multiplier
            level = Level(c_in, width, num_res_blocks, i in attn_levels, num_groups)
            if i < len(multipliers) - 1:
                level.downsample = downsample(width)
            self.down.append(level)
        self.mid_block = mid_block(width, num_res_blocks, num_groups)
        self.norm_out = norm(width, num_groups)
        # Twice z_channels, for the mean and the log-variance of a VAE. All bottlenecks keep it.
        self.conv_out = nn.Conv2d(width, 2 * z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)                                                # (B, hidden, H, W)
        for level in self.down:
            h = level(h)                                                   # (B, C_i, H/2^i, W/2^i)
        h = self.norm_out(self.mid_block(h))                               # (B, C_last, h, w)
        return self.conv_out(F.silu(h))                                    # (B, 2*z_channels, h, w)


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B,3,H,W): the encoder mirrored, with one more block per level."""

    def __init__(self, hidden, multipliers, num_res_blocks, attn_levels, z_channels, num_groups):
        super().__init__()
        widths = [hidden * multiplier for multiplier in multipliers]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid_block = mid_block(widths[-1], num_res_blocks, num_groups)
        self.up = nn.ModuleList()
        inputs = widths[1:] + widths[-1:]  # level i comes after level i + 1
        for i, (c_in, width) in enumerate(zip(inputs, widths)):
            level = Level(c_in, width, num_res_blocks + 1, i in attn_levels, num_groups)
            if i > 0:
                level.upsample = upsample(width)
            self.up.append(level)
        self.norm_out = norm(widths[0], num_groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        h = self.mid_block(self.conv_in(z))                                # (B, C_last, h, w)
        for level in reversed(self.up):
            h = level(h)                                                   # (B, C_i, H/2^i, W/2^i)
        return self.conv_out(F.silu(self.norm_out(h)))                     # (B, 3, H, W)


# -------------------------------------------------------------------------------------- bottlenecks
# Each maps pre (B,c,h,w) fp32, the output of quant_conv, to the latents z (B,d,h,w), one int64 per
# position (B,h,w) or None, and a scalar to add to the training loss.


class Bottleneck(nn.Module):
    """The bottleneck of `ae`, which does nothing, and the base class of the quantizers below.

    As in the public code, the mean and the variance of `pre` are tracked (momentum 0.1) and saved,
    but never used. They show whether the latents stay near the N(0, 1) that iFSQ assumes.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, dim, 1, 1))
        self.register_buffer("running_var", torch.ones(1, dim, 1, 1))

    @torch.no_grad()
    def track(self, pre):
        if self.training:
            var, mean = torch.var_mean(pre, (0, 2, 3), correction=0, keepdim=True)
            self.running_mean.lerp_(mean, 0.1)
            self.running_var.lerp_(var, 0.1)

    def forward(self, pre):
        self.track(pre)
        return pre, None, pre.new_zeros(())


class ScalarQuantizer(Bottleneck):
    """FSQ and iFSQ: see fsq.py. There is nothing to learn and no loss."""

    def __init__(self, levels, alpha, edges):
        super().__init__(len(levels))
        self.fsq = FSQ(levels, alpha, edges)

    def forward(self, pre):
        self.track(pre)
        z, indices = self.fsq(pre.movedim(1, -1))                          # (B,h,w,d), (B,h,w)
        return z.movedim(-1, 1), indices, pre.new_zeros(())

    def latents_of(self, indices):
        return self.fsq.indices_to_codes(indices).movedim(-1, 1)


class VectorQuantizer(Bottleneck):
    """VQ-VAE: the nearest of n learned vectors.

    `beta` is the weight of the codebook term, and the commitment term has weight 1. This is VQGAN's
    "legacy" loss, with which the public iFSQ code trains; other code has it the other way round.
    """

    def __init__(self, dim, codebook_size, beta):
        super().__init__(dim)
        self.beta = beta
        self.embedding = nn.Embedding(codebook_size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, pre):
        self.track(pre)
        x = pre.movedim(1, -1)                                             # (B,h,w,d)
        indices = self.nearest(x.detach().flatten(0, 2)).view(x.shape[:3])
        q = self.embedding(indices).float()                                # (B,h,w,d)
        loss = F.mse_loss(x, q.detach()) + self.beta * F.mse_loss(q, x.detach())
        z = q.detach() + (x - x.detach())  # straight-through, as in fsq.py
        return z.movedim(-1, 1), indices, loss

    def nearest(self, x):
        """x (B*h*w, d) -> (B*h*w) int64."""
        e = self.embedding.weight.float()                                  # (n, d)
        rows = max(1, 2**24 // len(e))  # the whole (B*h*w, n) table of distances may be too large
        # The 10 bits of TF32 would mistake near vectors for each other.
        tf32, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        indices = torch.cat([torch.cdist(part, e).argmin(1) for part in x.split(rows)])
        torch.backends.cuda.matmul.allow_tf32 = tf32
        return indices

    def latents_of(self, indices):
        return self.embedding(indices).movedim(-1, 1)


class DiagonalGaussian(nn.Module):
    """VAE: pre (B,2d,h,w) is mean and log-variance. z is a draw in training, else the mean."""

    def forward(self, pre):
        mean, logvar = self.moments(pre)
        noise = torch.randn_like(mean) if self.training else 0
        z = mean + (logvar / 2).exp() * noise
        return z, None, self.kl(mean, logvar).mean()

    @staticmethod
    def moments(pre):
        """(B,2d,h,w) -> mean and log-variance, (B,d,h,w) each."""
        mean, logvar = pre.chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    @staticmethod
    def kl(mean, logvar):
        """KL(N(mean, e^logvar) || N(0, 1)) in nats, summed over the latents of an image: (B,)."""
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))


class Tokenizer(nn.Module):
    """Encoder, bottleneck, decoder.

    quantizer:      one of QUANTIZERS
    levels:         code values per latent channel; d = len(levels) for every bottleneck. Their
                    product is the default size of vq, and vae and ae ignore their values
    alpha, edges:   of ifsq and fsq: see fsq.py; alpha is 1.6 and 2.0 by default
    hidden, multipliers, num_res_blocks: width hidden*m and number of blocks at each resolution;
                    there are len(multipliers) - 1 halvings
    attn_levels:    indices of the resolutions (0 is the full one) that get attention
    z_channels:     channels between the two 1x1 convolutions and the body; d by default
    num_groups:     of every GroupNorm. 32 groups of 32 channels are an instance norm, which removes
                    brightness and contrast from each channel, so narrow layers need fewer groups
    codebook_size, beta: of vq. The size is by default the product of the levels: the same bits
    Raises ValueError for values that do not fit together.
    """

    def __init__(self, quantizer="ifsq", levels=(17, 17, 17, 17), alpha=None, edges="half",
                 hidden=128, multipliers=(1, 1, 2, 4, 4), num_res_blocks=2, attn_levels=(),
                 z_channels=None, num_groups=32, codebook_size=None, beta=0.25):
        super().__init__()
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer must be one of {', '.join(QUANTIZERS)}, not {quantizer!r}")
        widths = [hidden * multiplier for multiplier in multipliers]
        if any(width % num_groups for width in [hidden, *widths]):
            raise ValueError(f"hidden and hidden * multipliers ({hidden}, {widths}) must be "
                             f"multiples of num_groups ({num_groups})")
        d = len(levels)
        z_channels = z_channels or d
        body = (hidden, multipliers, num_res_blocks, attn_levels, z_channels, num_groups)
        self.quantizer = quantizer
        self.levels = list(levels)
        self.latent_dim = d
        self.downsample = 2 ** (len(multipliers) - 1)
        self.encoder = Encoder(*body)
        self.decoder = Decoder(*body)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * d if quantizer == "vae" else d, 1)
        self.post_quant_conv = nn.Conv2d(d, z_channels, 1)
        if quantizer in SLOPES:
            alpha = SLOPES[quantizer] if alpha is None else alpha
            self.quantize = ScalarQuantizer(levels, alpha, edges)
        elif quantizer == "vq":
            size = math.prod(levels) if codebook_size is None else codebook_size
            if not 2 <= size <= 2**24:
                raise ValueError(f"a learned codebook has 2 to 2^24 vectors, not {size}: "
                                 "give another codebook_size or other levels")
            self.levels = [size]  # one digit per token
            self.quantize = VectorQuantizer(d, size, beta)
        elif quantizer == "vae":
            self.quantize = DiagonalGaussian()
        else:
            self.quantize = Bottleneck(d)

    @property
    def discrete(self):
        """Whether there are indices. Without them an AR model has nothing to predict."""
        return self.quantizer in ("ifsq", "fsq", "vq")

    def pre(self, x):
        """x (B,3,H,W) in [-1, 1] -> what comes into the bottleneck, (B,d,h,w) fp32; 2d for a vae.

        Raises ValueError if H or W is not a multiple of the downsampling factor.
        """
        height, width = x.shape[2:]
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"image height and width must be multiples of {self.downsample}, "
                             f"got {height} x {width}")
        h = self.encoder(x)                                                # (B, 2*z_channels, h, w)
        # quant_conv and the bottleneck run in fp32 under autocast too: see fsq.bound.
        with torch.autocast(x.device.type, enabled=False):
            return self.quant_conv(h.float())

    def bottleneck(self, x):
        """x (B,3,H,W) in [-1,1] -> z (B,d,h,w) fp32, indices (B,h,w) int64 or None, scalar loss."""
        pre = self.pre(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.quantize(pre)

    def encode(self, x):
        """x (B,3,H,W) in [-1, 1] -> z (B,d,h,w) and indices (B,h,w) int64 or None."""
        z, indices, _ = self.bottleneck(x)
        return z, indices

    def decode(self, z):
        """z (B,d,h,w) -> reconstruction (B,3,H,W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def latents_of(self, indices):
        """indices (B,h,w) int64 -> z (B,d,h,w). Raises ValueError for vae and ae."""
        if not self.discrete:
            raise ValueError(f"a {self.quantizer} tokenizer has continuous latents and no indices")
        return self.quantize.latents_of(indices)

    def decode_indices(self, indices):
        """indices (B,h,w) int64 -> reconstruction (B,3,H,W)."""
        return self.decode(self.latents_of(indices))

    def forward(self, x):
        """x (B,3,H,W) in [-1, 1] -> reconstruction (B,3,H,W), indices or None, scalar loss."""
        z, indices, loss = self.bottleneck(x)
        return self.decode(z), indices, loss

    def bits_per_image(self, height, width):
        """What the latents of one image cost: sum(log2 L) a position, or 16 bits a real number."""
        bits = 16 * self.latent_dim
        if self.discrete:
            bits = sum(math.log2(level) for level in self.levels)
        return height // self.downsample * (width // self.downsample) * bits


# ------------------------------------------------------------------------------------------- losses


class LPIPS(nn.Module):
    """Learned perceptual distance (arXiv 1801.03924), version 0.1. Nothing in it is trained.

    net:      "vgg" to train with, "alex" to report
    backbone: state dict of torchvision's vgg16 or alexnet
    heads:    state dict of the five published 1x1 convolutions, `linK.model.1.weight`
    Raises KeyError or RuntimeError if a state dict is not the one named.
    """

    TAPS = {"vgg": (3, 8, 15, 22, 29), "alex": (1, 4, 7, 9, 11)}  # ReLUs whose outputs are compared

    def __init__(self, net, backbone, heads):
        super().__init__()
        from torchvision import models  # here, because the import takes a second
        with torch.device("meta"):  # neither memory nor a random start for weights that are loaded
            model = models.vgg16() if net == "vgg" else models.alexnet()
        weights = {name.removeprefix("features."): value for name, value in backbone.items()
                   if name.startswith("features.")}
        model.features.load_state_dict(weights, assign=True)
        self.taps = self.TAPS[net]
        self.features = model.features[: self.taps[-1] + 1].eval().requires_grad_(False)
        for layer in self.features:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # its input may be an output that is compared
        for i in range(len(self.taps)):
            self.register_buffer(f"head{i}", heads[f"lin{i}.model.1.weight"].clone())
        shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]])
        self.register_buffer("shift", shift.view(1, 3, 1, 1))
        self.register_buffer("scale", scale.view(1, 3, 1, 1))

    def forward(self, x, y):
        """x, y (B,3,H,W) in [-1, 1] -> distance (B,), 0 for equal images.

        A side has at least 16 px (vgg) or 31 px (alex).
        """
        x = (x - self.shift) / self.scale
        y = (y - self.shift) / self.scale
        total = 0
        for i, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if i in self.taps:
                head = getattr(self, f"head{self.taps.index(i)}")          # (1, C_i, 1, 1)
                a, b = (F.normalize(h.float(), dim=1, eps=1e-10) for h in (x, y))
                difference = (a - b).square()                              # (B, C_i, H_i, W_i)
                total = total + (difference * head).sum(1).mean((1, 2))
        return total


def load_lpips(net, folder):
    """LPIPS with its published weights from `folder`, or downloaded into it: see `published`."""
    backbone = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth"}[net]
    heads = {"vgg": "lpips_vgg-a78928a0.pth", "alex": "lpips_alex-df73285e.pth"}[net]
    models = "https://download.pytorch.org/models"
    lpips = "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1"
    backbone_weights = published(f"{models}/{backbone}", folder, backbone)
    return LPIPS(net, backbone_weights, published(f"{lpips}/{net}.pth", folder, heads))


def published(url, folder, file_name):
    """The state dict in folder/file_name, which is downloaded from `url` if it is not there yet.

    The name ends in -HASH.pth, where HASH is the beginning of the file's SHA-256, which is always
    checked. Raises ValueError if the file cannot be had, or is not the published one.
    """
    path = Path(folder) / file_name
    expected = re.search(r"-(\w+)\.pth$", file_name)[1]
    try:
        if path.exists():  # torch.hub checks only what it downloads
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if not digest.startswith(expected):
                raise ValueError(f"the SHA-256 of the file there begins with {digest[:8]}")
        return torch.hub.load_state_dict_from_url(
            url, str(folder), "cpu", progress=False, check_hash=True, file_name=file_name,
            weights_only=True)
    except Exception as error:  # of the network, the disk or the unpickler: the remedy is the same
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file_name} cannot be used ({cause}): download {url} "
                         f"and save it in {folder} under that name") from error


def discriminator_layers(side):
    """n_layers for images of this shorter side: 4 (the paper) from 48 px, 3 from 24, 2 from 12.

    Raises ValueError for smaller images.
    """
    for n_layers in (4, 3, 2):
        if side // 2**n_layers > 2:  # n halvings, then two convolutions that each take one pixel
            return n_layers
    raise ValueError(f"images of {side} px are too small for a discriminator: it needs 12 px")


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017) as in VQGAN: one logit for each of many overlapping patches.

    (B,3,H,W) in [-1, 1] -> (B, 1, H // 2^n_layers - 2, W // 2^n_layers - 2)
    """

    def __init__(self, ndf=64, n_layers=4):
        super().__init__()
        layers = [nn.Conv2d(3, ndf, 4, 2, 1), nn.LeakyReLU(0.2)]
        c_in = ndf
        for i in range(1, n_layers + 1):
            c_out = ndf * min(2**i, 8)
            stride = 2 if i < n_layers else 1
            layers.append(nn.Conv2d(c_in, c_out, 4, stride, 1, bias=False))
            layers += [nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
            c_in = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c_in, 1, 4, 1, 1))
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, x):
        return self.main(x)


def reconstruction_loss(x, reconstruction, lpips=None, perceptual_weight=0.0):
    """x, reconstruction (B,3,H,W) -> L1 + perceptual_weight * LPIPS (fp32 scalar), dict of both."""
    l1 = F.l1_loss(reconstruction.float(), x.float())
    if lpips is None:
        return l1, {"l1": l1}
    distance = lpips(x, reconstruction).mean()
    return l1 + perceptual_weight * distance, {"l1": l1, "lpips": distance}


def discriminator_loss(logits_real, logits_fake):
    """Hinge loss: zero once real patches score above 1 and fake ones below -1."""
    real = F.relu(1 - logits_real.float()).mean()
    fake = F.relu(1 + logits_fake.float()).mean()
    return (real + fake) / 2


def adaptive_weight(base_loss, generator_loss, last_weight):
    """VQGAN eq. 7: the weight that gives both losses gradients of the same norm in `last_weight`.

    Returns a detached scalar in [0, 1e6]. Log it: a weight at its limit, or one that falls to 0,
    shows that adversarial training has gone wrong.
    """
    scale = 1024  # or fp16 would round the gradients of single pixels, 1 / (B*3*H*W), away
    pull, = torch.autograd.grad(scale * base_loss, last_weight, retain_graph=True)
    push, = torch.autograd.grad(scale * generator_loss, last_weight, retain_graph=True)
    ratio = pull.float().norm() / (push.float().norm() + scale * 1e-6)
    return ratio.clamp(0, 1e6).detach()


def adversarial_loss(reconstruction, base_loss, discriminator, last_weight, weight=0.5):
    """The generator's adversarial loss: weight * adaptive weight * -(mean logit).

    Returns this scalar, -(mean logit) and the adaptive weight. The discriminator's parameters take
    no gradient from it, so that its own step starts clean.
    """
    discriminator.requires_grad_(False)
    g_loss = -discriminator(reconstruction).float().mean()
    discriminator.requires_grad_(True)
    d_weight = adaptive_weight(base_loss, g_loss, last_weight)
    return weight * d_weight * g_loss, g_loss.detach(), d_weight


def psnr(x, y):
    """Peak signal-to-noise ratio in dB: x, y (B,3,H,W) in [0, 1] -> (B,), at most 100."""
    mse = (x - y).square().mean((1, 2, 3))
    return -10 * mse.clamp(min=1e-10).log10()  # clamped, so that equal images do not spoil a mean


# -------------------------------------------------------------------------------- released weights


OTHER_MODELS = {  # a part of a name that tells what a file is, if it is not an iFSQ tokenizer
    "encoder.conv_blocks.": "LlamaGen's VQ-16",
    "encoder.down_blocks.": "SD-VAE in the names of diffusers",
    "coder.mid.attn_1.": "SD-VAE or one like it",
    "coder.norm_out.norm.": "a tokenizer with layer norms (norm_type of its config.json)",
    "quantize.project_in.": "a tokenizer whose embed_dim is not its number of levels",
}


def released_weights(weights):
    """The weights without the quantizer's buffers, which the public code averages as well."""
    return {name: value for name, value in weights.items() if not name.startswith("quantize._")}


def released_arguments(weights, config=None, levels=None, alpha=None):
    """Arguments of Tokenizer for a state dict of Tencent-Hunyuan/iFSQ, read off its shapes.

    Levels and slope of a scalar quantizer are in no shape: see `released_quantizer`. Raises
    ValueError if they are missing or contradict the shapes, or if the weights do not fit.
    """
    shapes = {name: tuple(value.shape) for name, value in released_weights(weights).items()}
    for part, model in OTHER_MODELS.items():
        if any(part in name for name in shapes):
            raise ValueError(f"this is {model}, not one of the paper's tokenizers, which alone "
                             "can be read")
    try:
        arguments = released_body(shapes)
        d, moments = shapes["post_quant_conv.weight"][1], shapes["quant_conv.weight"][0]
    except KeyError as error:
        raise ValueError(f"not the weights of a public iFSQ tokenizer: no {error}") from error
    if "quantize.embedding.weight" in shapes:
        size = shapes["quantize.embedding.weight"][0]
        arguments.update(quantizer="vq", levels=[17] * d, codebook_size=size)  # only d counts
    elif moments == 2 * d:
        arguments.update(quantizer="vae", levels=[17] * d)
    else:
        arguments.update(released_quantizer(weights, config or {}, levels, alpha))
    if len(arguments["levels"]) != d:
        raise ValueError(f"levels {arguments['levels']} do not fit {d} latent channels")
    with torch.device("meta"):  # shapes without memory
        expected = Tokenizer(**arguments).state_dict()
    wrong = shapes.items() ^ {name: tuple(value.shape) for name, value in expected.items()}.items()
    if wrong:
        raise ValueError("not the weights of a public iFSQ tokenizer: "
                         f"{min(wrong)[0]} is missing, unknown or of another shape")
    return arguments


def released_body(shapes):
    """Arguments of encoder and decoder for weights of these shapes. KeyError if some lack."""
    resolutions = {name.split(".")[2] for name in shapes if name.startswith("encoder.down.")}
    blocks = {name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}
    hidden = shapes["encoder.conv_in.weight"][0]
    levels = range(max(1, len(resolutions)))
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in levels]
    attention = [i for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in shapes]
    return {"hidden": hidden, "multipliers": [width // hidden for width in widths],
            "num_res_blocks": len(blocks), "z_channels": shapes["post_quant_conv.weight"][0],
            "num_groups": 32, "attn_levels": attention}


def released_quantizer(weights, config, levels, alpha):
    """quantizer, levels, alpha and edges of an FSQ of the public code.

    Levels and slope are those given, or else those in `config`, the dict in the config.json beside
    the file. Averaged weights hold the levels too.
    """
    edges = "half"
    stored = weights.get("quantize._levels")
    if levels is None and stored is not None:
        levels = [round(level) for level in stored.tolist()]  # averaged, so they are floats
        if levels != config.get("levels", levels):
            raise ValueError(f"the weights have levels {levels}, config.json {config['levels']}: "
                             "mend config.json, or give --levels")
    if levels is None:
        levels = config.get("levels")
    # Where it is not said, the public code takes the FSQ of Mentzer et al., which has no slope.
    # The bound with a slope is for odd levels only.
    even = any(level % 2 == 0 for level in levels or ())
    if even or not config.get("do_simple_bound", "act_fun" not in config):
        edges = "original"
        alpha = alpha or 2.0
    if alpha is None and "act_fun" in config:
        match = re.fullmatch(r"scale_sigmoid_(\d\d)", str(config["act_fun"]))
        if not match:
            raise ValueError(f"act_fun {config['act_fun']!r} of config.json is not supported: if "
                             "it is a sigmoid, give its slope with --alpha")
        alpha = int(match[1]) / 10
    for value, what, flag in ((levels, "levels", "--levels"), (alpha, "slope", "--alpha")):
        if value is None:
            raise ValueError(f"the {what} of the quantizer cannot be read from the weights: "
                             f"put the run's config.json beside the file or give {flag}")
    quantizer = "fsq" if alpha == 2.0 else "ifsq"
    return {"quantizer": quantizer, "levels": list(map(int, levels)), "alpha": alpha,
            "edges": edges}
