"""DiT: a transformer that turns Gaussian noise into latents, trained by flow matching.

    image -> Tokenizer.encode -> latents --[ this file ]--> new latents -> Tokenizer.decode -> image

Here each channel of the latents has about mean 0 and variance 1: the caller normalises the
tokenizer's latents, and undoes this before decoding.

The chapters: embeddings, the network, the loss, the sampler, released checkpoints. The file needs
only torch and knows nothing of the tokenizer. The caller draws everything random (noise, times,
dropped labels), so a training step or a sample is a pure function of its arguments.

Sources
  DiT, adaLN-zero      Peebles & Xie, arXiv 2212.09748; github.com/facebookresearch/DiT
  flow matching        Lipman et al., arXiv 2210.02747; Liu et al., 2209.03003; SiT, 2401.08740
  logit-normal t       Esser et al. (Stable Diffusion 3), arXiv 2403.03206, section 3.1
  modern switches      LightningDiT, arXiv 2501.01423: QK-norm, SwiGLU, RoPE, RMSNorm, cosine loss
  iFSQ's DiT           arXiv 2601.17124; github.com/Tencent-Hunyuan/iFSQ, folder dit/

Shape letters: B batch, T tokens, C width, N heads, D = C/N width of a head, d latent dims, h w
latent grid, p patch size, so T = h*w/p^2.

    import torch
    from dit import SIZES, DiT, flow_matching_loss, logit_normal_t, sample
    depth, width, heads = SIZES["nano"]
    model = DiT(input_size=(4, 4), in_channels=4, hidden_size=width, depth=depth, num_heads=heads,
                num_classes=10)
    latents, labels = torch.rand(8, 4, 4, 4) * 2 - 1, torch.arange(8)
    noise, t, drop = torch.randn(8, 4, 4, 4), logit_normal_t(8), torch.rand(8) < 0.1
    flow_matching_loss(model, latents, labels, noise, t, drop=drop)["loss"].backward()
    new = sample(model, noise, labels, steps=4, cfg_scale=2.0)             # (8,4,4,4) latents
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# name: (depth, width, heads). nano is ours, for a laptop; S to XL are DiT's, and the last two
# the public code's.
SIZES = {
    "nano": (12, 96, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}


# ---- Embeddings: position, patch, time and class ----

def grid_angles(height, width, count):
    """Row and column of each token times `count` frequencies, 1 to about 1e-4: two (T, count)."""
    freqs = 10000.0 ** (-torch.arange(count) / count)          # (count,)
    rows = torch.arange(height).repeat_interleave(width)       # (T,)
    cols = torch.arange(width).repeat(height)                  # (T,)
    return rows[:, None] * freqs, cols[:, None] * freqs        # (T, count) each


def sincos_positions(height, width, dim):
    """Fixed sine-cosine table (1,T,dim): the first half for the column, the second for the row."""
    rows, cols = grid_angles(height, width, dim // 4)          # (T, dim/4) each
    table = [cols.sin(), cols.cos(), rows.sin(), rows.cos()]
    return torch.cat(table, dim=1)[None]                       # (1, T, dim)


class Rope2d(nn.Module):
    """Rotary position embedding: half of each head turns with the row, half with the column.

    Channels turn in pairs (0,1), (2,3), ...; the other common layout pairs i and i + D/2.
    """

    def __init__(self, height, width, head_dim):
        super().__init__()
        angles = torch.cat(grid_angles(height, width, head_dim // 4), dim=1)  # (T, D/2)
        angles = angles.repeat_interleave(2, dim=1)            # (T, D)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)        # (B, N, T, D/2) each
        quarter_turn = torch.stack([-odd, even], dim=-1)       # (B, N, T, D/2, 2)
        return x * self.freqs_cos + quarter_turn.flatten(-2) * self.freqs_sin  # (B, N, T, D)


class PatchEmbed(nn.Module):
    """p x p patches of the latent grid to tokens, in raster order: (B,d,h,w) -> (B,T,C)."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)         # (B, T, C)


def time_features(t):
    """128 cosines and 128 sines of t: (B,) -> (B,256). t is in [0,1], not times 1000 as in DDPM."""
    freqs = 10000.0 ** (-torch.arange(128, device=t.device) / 128)            # (128,)
    angles = t.float()[:, None] * freqs                        # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)      # (B, 256)


class TimestepEmbedder(nn.Module):
    """A time t in [0,1] to a vector: (B,) -> (B,C)."""

    def __init__(self, hidden_size):
        super().__init__()
        first, last = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, t):
        return self.mlp(time_features(t))                      # (B, C)


class LabelEmbedder(nn.Module):
    """A class to a vector: (B,) int64 -> (B,C). The last row, `num_classes`, means "no label"."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels, drop=None):
        if drop is not None:
            labels = labels.masked_fill(drop, self.num_classes)               # (B,)
        return self.embedding_table(labels)                    # (B, C)


# ---- The network ----

def make_norm(hidden_size, rmsnorm):
    """The norm before an adaLN modulation. RMSNorm has a scale of its own, LayerNorm has none."""
    if rmsnorm:
        return nn.RMSNorm(hidden_size, eps=1e-6)
    return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


def make_qk_norm(head_dim, qk_norm, rmsnorm):
    """The norm of each head's queries or keys. LayerNorm has eps 1e-5, as in the public code."""
    if not qk_norm:
        return nn.Identity()
    if rmsnorm:
        return nn.RMSNorm(head_dim, eps=1e-6)
    return nn.LayerNorm(head_dim)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]           # (B, T, C)


class Attention(nn.Module):
    """Self-attention over all tokens. QK-norm keeps the attention logits bounded."""

    def __init__(self, hidden_size, num_heads, qk_norm, rmsnorm):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = make_qk_norm(hidden_size // num_heads, qk_norm, rmsnorm)
        self.k_norm = make_qk_norm(hidden_size // num_heads, qk_norm, rmsnorm)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, rope=None):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))               # (B, T, 3, N, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                   # (B, N, T, D) each
        q = self.q_norm(q.float())  # norm and rotation stay in fp32 under autocast
        k = self.k_norm(k.float())
        if rope is not None:
            q, k = rope(q), rope(k)                            # (B, N, T, D) each
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = F.scaled_dot_product_attention(q, k, v)          # (B, N, T, D)
        out = out.transpose(1, 2).flatten(2)                   # (B, T, C)
        return self.proj(out)                                  # (B, T, C)


def mlp(hidden_size):
    """DiT's feed-forward layer: 4C wide, with the tanh approximation of GELU."""
    fc1, fc2 = nn.Linear(hidden_size, 4 * hidden_size), nn.Linear(4 * hidden_size, hidden_size)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): 2/3 as wide as Mlp, but with three matrices."""

    def __init__(self, hidden_size):
        super().__init__()
        inner = int(2 / 3 * 4 * hidden_size)
        self.w12 = nn.Linear(hidden_size, 2 * inner)           # two of the three matrices
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)             # (B, T, 8C/3) each
        return self.w3(F.silu(gate) * value)                   # (B, T, C)


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by c (B,C): adaLN-zero."""

    def __init__(self, hidden_size, num_heads, qk_norm, swiglu, rmsnorm):
        super().__init__()
        self.norm1 = make_norm(hidden_size, rmsnorm)
        self.attn = Attention(hidden_size, num_heads, qk_norm, rmsnorm)
        self.norm2 = make_norm(hidden_size, rmsnorm)
        self.mlp = SwiGLU(hidden_size) if swiglu else mlp(hidden_size)
        modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x, c, rope=None):
        modulation = self.adaLN_modulation(c).chunk(6, dim=1)  # six of (B, C)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        update = self.attn(modulate(self.norm1(x), shift1, scale1), rope)     # (B, T, C)
        x = x + gate1[:, None] * update                        # (B, T, C)
        update = self.mlp(modulate(self.norm2(x), shift2, scale2))            # (B, T, C)
        return x + gate2[:, None] * update                     # (B, T, C)


class FinalLayer(nn.Module):
    """The last norm and the linear map to the patch: (B,T,C) -> (B,T,out_features)."""

    def __init__(self, hidden_size, out_features, rmsnorm):
        super().__init__()
        self.norm_final = make_norm(hidden_size, rmsnorm)
        self.linear = nn.Linear(hidden_size, out_features)
        modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)               # (B, C) each
        x = modulate(self.norm_final(x), shift, scale)         # (B, T, C)
        return self.linear(x)                                  # (B, T, p*p*d)


class DiT(nn.Module):
    """Diffusion transformer: noisy latents, time and class -> velocity.

    input_size    (h, w) of the latents, not necessarily equal; each divisible by patch_size
    in_channels   d, the latent dims
    hidden_size, depth, num_heads   C, the number of blocks, N: see SIZES
    num_classes   1 or more (unconditional: 1); label `num_classes` means "no label"
    qk_norm, swiglu, rope, rmsnorm  all on: iFSQ's DiT; all off: facebookresearch/DiT
    learn_sigma   2d output channels, only to load such checkpoints: the loss and the sampler need d
    grad_checkpoint   recompute each block in the backward pass: less memory, one more forward

    Has .dim (C), .grid (rows and columns of tokens), .depth, .num_classes, .input_size.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, *, input_size, in_channels, hidden_size, depth, num_heads, num_classes,
                 patch_size=1, qk_norm=True, swiglu=True, rope=True, rmsnorm=True,
                 learn_sigma=False, grad_checkpoint=False):
        super().__init__()
        h, w = input_size
        if h % patch_size or w % patch_size:
            raise ValueError(f"latent grid {h}x{w} does not divide by patch_size {patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not divide by num_heads {num_heads}")
        head_dim = hidden_size // num_heads
        if hidden_size % 4 or (rope and head_dim % 4):
            raise ValueError("2D positions need widths divisible by 4, got hidden_size "
                             f"{hidden_size} and {head_dim} per head")
        self.input_size, self.grid = (h, w), (h // patch_size, w // patch_size)
        self.in_channels, self.patch_size = in_channels, patch_size
        self.dim, self.depth, self.num_classes = hidden_size, depth, num_classes
        self.grad_checkpoint = grad_checkpoint
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", sincos_positions(*self.grid, hidden_size))
        self.feat_rope = Rope2d(*self.grid, head_dim) if rope else None
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, qk_norm, swiglu, rmsnorm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, rmsnorm)
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                # flatten(1) is a view: the patch convolution is initialised like a linear layer.
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        # adaLN-zero: every gate starts at 0, so each block starts as the identity. The output is 0.
        zeroed = [block.adaLN_modulation[1] for block in self.blocks]
        zeroed += [self.final_layer.adaLN_modulation[1], self.final_layer.linear]
        for layer in zeroed:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, labels, drop=None, hidden_layer=None):
        """Predict the velocity at x_t and, on request, return hidden states for REPA and probes.

        x             (B,d,h,w) float, noisy latents x_t
        t             (B,) float in [0,1], 0 is noise and 1 is data
        labels        (B,) int64 in [0, num_classes]
        drop          (B,) bool, True where the label is replaced by "no label"; None drops nothing
        hidden_layer  None, a layer k in 1..depth, or a sequence of layers

        Returns the velocity (B,d,h,w), with learn_sigma (B,2d,h,w). With hidden_layer k, returns
        the pair (velocity, state (B,T,C) after block k); with a sequence, (velocity, list of
        states).
        Raises ValueError for a wrong shape or layer.
        """
        layers = [hidden_layer] if isinstance(hidden_layer, int) else list(hidden_layer or [])
        self.check_inputs(x, t, labels, layers)
        x = self.x_embedder(x) + self.pos_embed                # (B, T, C)
        c = self.t_embedder(t) + self.y_embedder(labels, drop)                # (B, C)
        states = {}
        for k, block in enumerate(self.blocks, start=1):
            if self.grad_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=False)  # (B, T, C)
            else:
                x = block(x, c, self.feat_rope)                # (B, T, C)
            if k in layers:
                states[k] = x
        velocity = self.unpatchify(self.final_layer(x, c))     # (B, d, h, w)
        if hidden_layer is None:
            return velocity
        if isinstance(hidden_layer, int):
            return velocity, states[hidden_layer]
        return velocity, [states[k] for k in layers]

    def unpatchify(self, x):
        """The values of each token's patch (B,T,p*p*d), channel last -> (B,d,h,w)."""
        p = self.patch_size
        x = x.unflatten(2, (p * p, -1)).transpose(1, 3)        # (B, d, p*p, T)
        return F.pixel_shuffle(x.flatten(1, 2).unflatten(2, self.grid), p)    # (B, d, h, w)

    def check_inputs(self, x, t, labels, layers):
        """Checks shapes only: reading values would make the host wait for the device."""
        d, (h, w) = self.in_channels, self.input_size
        if x.ndim != 4 or x.shape[1:] != (d, h, w):
            raise ValueError(f"latents of shape {tuple(x.shape)}, this DiT was built for (B, {d}, "
                             f"{h}, {w}): check tokenizer and image size")
        if t.shape != x.shape[:1] or labels.shape != x.shape[:1]:
            raise ValueError(f"t {tuple(t.shape)} and labels {tuple(labels.shape)} must have shape "
                             f"({len(x)},), one value per latent")
        if any(not 1 <= k <= self.depth for k in layers):
            raise ValueError(f"hidden_layer {layers} is not in 1..{self.depth}")

    def flops_per_image(self):
        """Training FLOPs of one image, an int: 3 x those of a forward pass (a multiply-add is 2).

            forward = 2*T*W + 2*V + 4*T*T*C*depth

        W counts the entries of the matrices applied to every token, V those applied once per image
        (time MLP, adaLN); the last term is q @ k^T and weights @ v. Norms, activations, softmax,
        biases and recomputation by grad_checkpoint are not counted.
        """
        T = math.prod(self.grid)
        products = 2 * T**2 * self.dim * self.depth
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or "y_embedder" in name:
                continue
            per_image = "adaLN" in name or "t_embedder" in name
            products += parameter.numel() * (1 if per_image else T)
        return 3 * 2 * products


# ---- The loss: on the straight path x_t = (1-t)*noise + t*data, the velocity is data - noise ----

def logit_normal_t(count, mean=0.0, std=1.0, generator=None, device=None):
    """Draw training times (count,) float32 in (0,1): the sigmoid of a Gaussian, mostly near 0.5.

    `generator` must live on `device`. Source: arXiv 2403.03206, section 3.1; iFSQ has mean 0, std
    1.
    """
    gaussian = torch.randn(count, generator=generator, device=device)         # (count,)
    return torch.sigmoid(mean + std * gaussian)                # (count,)


def flow_matching_loss(model, x1, labels, noise, t, cosine=True, drop=None, hidden_layer=None):
    """Squared error of the velocity, plus 1 - cos between predicted and true velocity.

    x1, noise     (B,d,h,w) float: clean normalised latents, standard Gaussian noise
    t             (B,) float in [0,1], see `logit_normal_t`
    cosine        add the cosine term with weight 1, as iFSQ does; cos is over the d latent dims
    labels, drop, hidden_layer   see `DiT.forward`

    Returns a dict: "loss" a scalar; "mse" and, with cosine, "cosine", both (B,) and detached; and,
    with hidden_layer, "hidden", the second output of `model`. The loss is computed in float32.
    """
    x1, noise = x1.float(), noise.float()
    time = t.float()[:, None, None, None]                      # (B, 1, 1, 1)
    x_t = (1 - time) * noise + time * x1                       # (B, d, h, w)
    target = x1 - noise                                        # (B, d, h, w)
    result = {}
    output = model(x_t, t, labels, drop=drop, hidden_layer=hidden_layer)
    if hidden_layer is not None:
        output, result["hidden"] = output
    velocity = output.float()                                  # (B, d, h, w)

    loss = (velocity - target).square().mean(dim=(1, 2, 3))    # (B,)
    result["mse"] = loss.detach()
    if cosine:
        # A new model predicts velocity 0, where the cosine's gradient is of order 1/eps: with the
        # usual eps of 1e-8 it would overflow fp16.
        similarity = F.cosine_similarity(velocity, target, dim=1, eps=1e-3)   # (B, h, w)
        distance = (1 - similarity).mean(dim=(1, 2))           # (B,)
        result["cosine"] = distance.detach()
        loss = loss + distance
    result["loss"] = loss.mean()
    return result


# ---- The sampler: follow dx/dt = velocity(x, t) from noise at t=0 to data at t=1 ----

def time_grid(steps, timestep_shift=1.0):
    """The steps + 1 times from 0 to 1: uniform t -> s*t / (1 + (s-1)*t), where s is the shift.

    They are rounded to float32, as in the public code, since a step may lie on the very edge of
    cfg_interval. s = 1 is uniform, and so is 0, the public code's "no shift". s < 1 takes small
    steps near the noise, s > 1 near the data. In arXiv 2403.03206 t runs the other way and the
    shift is 1/s. Raises ValueError unless steps >= 1 and s >= 0.
    """
    if steps < 1 or timestep_shift < 0:
        raise ValueError(f"steps {steps} and timestep_shift {timestep_shift}: need steps >= 1 and "
                         "a shift >= 0 (1 or 0 = uniform)")
    shift = timestep_shift or 1.0
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float32)   # (steps + 1,)
    return [*(shift * t / (1 + (shift - 1) * t)).tolist()[:-1], 1.0]


def guided_velocity(model, x, t, labels, cfg_scale, guide_channels=None):
    """Classifier-free guidance: v_null + cfg_scale * (v_label - v_null), in one call with 2B rows.

    x (B,d,h,w), t (B,), labels (B,) -> (B,d,h,w) float32. With `guide_channels` k only the first k
    channels are guided: facebookresearch/DiT and iFSQ use k = 3, also for 4 channels. None guides
    all.
    Source: arXiv 2207.12598, whose weight w is cfg_scale - 1.
    """
    null = torch.full_like(labels, model.num_classes)          # (B,)
    velocity = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
    cond, uncond = velocity.float().chunk(2)                   # (B, d, h, w) each
    guided = uncond + cfg_scale * (cond - uncond)              # (B, d, h, w)
    if guide_channels is None:
        return guided
    return torch.cat([guided[:, :guide_channels], cond[:, guide_channels:]], dim=1)


@torch.no_grad()
def sample(model, noise, labels, steps=250, sampler="euler", cfg_scale=1.0,
           cfg_interval=(0.0, 1.0), timestep_shift=1.0, guide_channels=None):
    """Turn noise into latents by solving the ODE: deterministic given noise and labels.

    model           a DiT, or any callable (x, t, labels) -> velocity with `num_classes`
    noise           (B,d,h,w), standard Gaussian
    labels          (B,) int64 in [0, num_classes]
    steps, sampler  "euler": one model call per step, first order; "heun": two calls, second order
    cfg_scale       1 = no guidance (half the cost)
    cfg_interval    (lo, hi): guide only at times lo <= t <= hi (arXiv 2404.07724)
    timestep_shift, guide_channels   see `time_grid` and `guided_velocity`

    Returns latents (B,d,h,w) float32 on the scale of the training latents. Raises ValueError for an
    unknown sampler or settings out of range.
    """
    lo, hi = cfg_interval
    if sampler not in ("euler", "heun"):
        raise ValueError(f'unknown sampler "{sampler}": choose "euler" or "heun"')
    if not 0 <= lo <= hi <= 1:
        raise ValueError(f"cfg_interval ({lo}, {hi}) must satisfy 0 <= lo <= hi <= 1")
    lo, hi = torch.tensor([lo, hi], dtype=torch.float32).tolist()  # as the times are

    def velocity(x, time):
        t = torch.full((len(x),), time, dtype=torch.float32, device=x.device)  # (B,)
        if cfg_scale != 1 and lo <= time <= hi:
            return guided_velocity(model, x, t, labels, cfg_scale, guide_channels)
        return model(x, t, labels).float()                     # (B, d, h, w)

    x = noise.float()                                          # (B, d, h, w)
    times = time_grid(steps, timestep_shift)
    for now, then in zip(times[:-1], times[1:]):
        slope = velocity(x, now)                               # (B, d, h, w)
        if sampler == "heun":  # the mean of the slopes at both ends of the Euler step
            end = velocity(x + (then - now) * slope, then)     # (B, d, h, w)
            slope = (slope + end) / 2
        x = x + (then - now) * slope                           # (B, d, h, w)
    return x


# ---- Released checkpoints ----

def released_arguments(weights, heads=None, rope=None):
    """Constructor arguments of the DiT whose public state dict is `weights` (key -> tensor).

    weights  of github.com/Tencent-Hunyuan/iFSQ or facebookresearch/DiT, without a key prefix
    heads    num_heads, if the weights do not tell it; None: that of a public size in SIZES
    rope     used only if the weights have no rope buffers; None: on if QK-norm is

    The latent grid is taken to be square. Raises ValueError for another state dict, or if the
    number of heads is unknown.
    """
    for key in ("pos_embed", "x_embedder.proj.weight", "y_embedder.embedding_table.weight"):
        if key not in weights:
            raise ValueError(f"this is not a DiT of iFSQ or facebookresearch: it has no {key}")
    hidden_size, in_channels, patch_size, _ = weights["x_embedder.proj.weight"].shape
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    tokens = weights["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise ValueError(f"this DiT has {tokens} tokens: only square grids can be loaded")
    qk_norm = "blocks.0.attn.q_norm.weight" in weights
    if "feat_rope.freqs_cos" in weights:
        rope = True
        heads = hidden_size // weights["feat_rope.freqs_cos"].shape[1]
    elif qk_norm:
        heads = hidden_size // len(weights["blocks.0.attn.q_norm.weight"])
    else:
        known = {size[:2]: size[2] for name, size in SIZES.items() if name != "nano"}
        heads = heads or known.get((depth, hidden_size))
    if heads is None:
        raise ValueError(f"no known DiT has {depth} layers of width {hidden_size}: give its number "
                         "of attention heads with --heads")
    return {
        "input_size": (side * patch_size, side * patch_size),
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": heads,
        "num_classes": len(weights["y_embedder.embedding_table.weight"]) - 1,
        "patch_size": patch_size,
        "qk_norm": qk_norm,
        "swiglu": "blocks.0.mlp.w12.weight" in weights,
        "rope": qk_norm if rope is None else rope,
        "rmsnorm": "blocks.0.norm1.weight" in weights,
        "learn_sigma": len(weights["final_layer.linear.weight"]) == 2 * in_channels * patch_size**2,
    }


def released_weights(weights, model=None):
    """A public state dict for strict loading: without `projectors.*`, which belong to REPA.

    Where it lacks fixed buffers (positions, rope), those of `model` are added.
    """
    state = {} if model is None else dict(model.named_buffers())
    state |= weights
    return {key: value for key, value in state.items() if not key.startswith("projectors.")}
