"""DiT: a transformer that learns to turn Gaussian noise into latents, by flow matching.

Where it stands: image -> Tokenizer.encode -> latents (B,d,h,w) -> THIS FILE -> new latents -> Tokenizer.decode -> image.
It needs torch and nothing else, knows nothing of the tokenizer, and can be copied out alone. Four chapters:
embeddings, the network, the loss, the sampler. Whoever calls draws the randomness: noise, t and dropped labels are
arguments, so a training run or a sample is a pure function of the caller's seed.

Sources:
  DiT, adaLN-zero      Peebles & Xie, arXiv 2212.09748; github.com/facebookresearch/DiT (all four switches off)
  flow matching        Lipman et al., arXiv 2210.02747; Liu et al., arXiv 2209.03003; SiT, arXiv 2401.08740
  logit-normal t       Esser et al. (Stable Diffusion 3), arXiv 2403.03206, section 3.1
  the modern switches  LightningDiT, arXiv 2501.01423: QK-norm, SwiGLU, RoPE, RMSNorm, and the cosine loss
  iFSQ's DiT           arXiv 2601.17124; github.com/Tencent-Hunyuan/iFSQ, dit/ (all four switches on; same parameter names)

Shape letters: B batch, T tokens, C width, N heads, D = C/N, d latent dims, h w latent grid, p patch size, so T = h*w/p^2.

>>> import torch
>>> from dit import SIZES, DiT, flow_matching_loss, logit_normal_t, sample
>>> depth, hidden_size, num_heads = SIZES["nano"]
>>> model = DiT(input_size=(4, 4), in_channels=4, hidden_size=hidden_size, depth=depth, num_heads=num_heads, num_classes=10)
>>> rng = torch.Generator().manual_seed(0)
>>> latents, labels = torch.rand(8, 4, 4, 4, generator=rng) * 2 - 1, torch.arange(8)
>>> noise, t = torch.randn(8, 4, 4, 4, generator=rng), logit_normal_t(8, generator=rng)
>>> drop = torch.rand(8, generator=rng) < 0.1
>>> flow_matching_loss(model, latents, labels, noise, t, drop=drop)["loss"].backward()
>>> sample(model, noise, labels, steps=4, cfg_scale=2.0).shape
torch.Size([8, 4, 4, 4])
"""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

SIZES = {  # name: (depth, hidden_size, num_heads); nano is ours, for a laptop; the others are DiT's
    "nano": (12, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


# ---- Embeddings: where a token is, what it holds, what time it is, which class is wanted ----

def grid_angles(height, width, count):
    """Row and column of each token (raster order) times `count` frequencies from 1 down towards 1e-4: two of (T, count)."""
    freqs = 10000.0 ** (-torch.arange(count) / count)                                   # (count,)
    rows = torch.arange(height).repeat_interleave(width)                                # (T,)
    cols = torch.arange(width).repeat(height)                                           # (T,)
    return rows[:, None] * freqs, cols[:, None] * freqs                                 # (T, count) each


def sincos_positions(height, width, dim):
    """Fixed sine-cosine table (1,T,dim), half for the column and half for the row, column first (as in DiT's code)."""
    rows, cols = grid_angles(height, width, dim // 4)                                   # (T, dim/4) each
    return torch.cat([cols.sin(), cols.cos(), rows.sin(), rows.cos()], dim=1)[None]     # (1, T, dim)


class Rope2d(nn.Module):
    """Rotary position embedding on a grid: the first half of each head turns with the row, the second with the column.

    Channels turn in neighbouring pairs (0,1), (2,3), ... (interleaved; the other common layout pairs i with i + D/2).
    """

    def __init__(self, height, width, head_dim):
        super().__init__()
        angles = torch.cat(grid_angles(height, width, head_dim // 4), dim=1)            # (T, D/2) one per pair
        angles = angles.repeat_interleave(2, dim=1)                                     # (T, D)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)                                 # (B, N, T, D/2) each
        quarter_turn = torch.stack([-odd, even], dim=-1).flatten(-2)                    # (B, N, T, D)
        return x * self.freqs_cos + quarter_turn * self.freqs_sin                       # (B, N, T, D)


class PatchEmbed(nn.Module):
    """p x p patches of the latent grid to tokens, in raster order: (B,d,h,w) -> (B,T,C)."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)                                  # (B, T, C)


def time_features(t):
    """128 cosines and 128 sines of t: (B,) -> (B,256). t in [0,1] goes in as it is, not times 1000 as in DDPM."""
    freqs = 10000.0 ** (-torch.arange(128, device=t.device) / 128)                      # (128,)
    angles = t.float()[:, None] * freqs                                                 # (B, 128)
    return torch.cat([angles.cos(), angles.sin()], dim=1)                               # (B, 256)


class TimestepEmbedder(nn.Module):
    """A time t in [0,1] to a vector: (B,) -> (B,C)."""

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        return self.mlp(time_features(t))                                               # (B, C)


class LabelEmbedder(nn.Module):
    """A class to a vector: (B,) int64 -> (B,C). The last row, `num_classes`, is the null class, "no label given"."""

    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, y, drop=None):
        if drop is not None:
            y = y.masked_fill(drop, self.embedding_table.num_embeddings - 1)            # (B,)
        return self.embedding_table(y)                                                  # (B, C)


# ---- The network ----

def make_norm(hidden_size, rmsnorm):
    """The norm before an adaLN modulation. LayerNorm brings no scale of its own (adaLN gives one), RMSNorm does."""
    return nn.RMSNorm(hidden_size, eps=1e-6) if rmsnorm else nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]                                    # (B, T, C)


class Attention(nn.Module):
    """Every token looks at every other; with QK-norm, queries and keys are normalised per head, so logits stay bounded."""

    def __init__(self, hidden_size, num_heads, qk_norm, rmsnorm):
        super().__init__()
        self.num_heads = num_heads
        head_dim = hidden_size // num_heads
        norm = partial(nn.RMSNorm, head_dim, eps=1e-6) if rmsnorm else partial(nn.LayerNorm, head_dim)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = norm() if qk_norm else nn.Identity()
        self.k_norm = norm() if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, rope=None):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))                         # (B, T, 3, N, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                            # (B, N, T, D) each
        q, k = self.q_norm(q.float()), self.k_norm(k.float())  # norm and rotation in fp32, whatever the autocast
        if rope is not None:
            q, k = rope(q), rope(k)                                                     # (B, N, T, D) each
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)           # (B, N, T, D)
        return self.proj(out.transpose(1, 2).flatten(2))                                # (B, T, C)


class Mlp(nn.Module):
    """DiT's feed-forward layer: 4C wide, GELU in its tanh approximation."""

    def __init__(self, hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))                        # (B, T, C)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): 2/3 as wide, since it has three matrices (w12 holds two) and not two."""

    def __init__(self, hidden_size):
        super().__init__()
        inner = int(2 / 3 * 4 * hidden_size)
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)                                      # (B, T, 8C/3) each
        return self.w3(F.silu(gate) * value)                                            # (B, T, C)


class Block(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the condition c (adaLN-zero, DiT figure 3)."""

    def __init__(self, hidden_size, num_heads, qk_norm, swiglu, rmsnorm):
        super().__init__()
        self.norm1 = make_norm(hidden_size, rmsnorm)
        self.attn = Attention(hidden_size, num_heads, qk_norm, rmsnorm)
        self.norm2 = make_norm(hidden_size, rmsnorm)
        self.mlp = SwiGLU(hidden_size) if swiglu else Mlp(hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c, rope=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)   # (B, C) each
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1), rope)         # (B, T, C)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))             # (B, T, C)


class FinalLayer(nn.Module):
    """The last norm and the linear map from a token to the values of its patch: (B,T,C) -> (B,T,p*p*channels)."""

    def __init__(self, hidden_size, out_features, rmsnorm):
        super().__init__()
        self.norm_final = make_norm(hidden_size, rmsnorm)
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)                         # (B, C) each
        return self.linear(modulate(self.norm_final(x), shift, scale))                  # (B, T, p*p*channels)


class DiT(nn.Module):
    """Diffusion transformer: noisy latents, time and class -> velocity.

    input_size    (h, w) of the latents, not necessarily equal; each divisible by patch_size
    in_channels   d, the latent dims; num_classes may be 1 (unconditional); the null class is row `num_classes`
    hidden_size, depth, num_heads   one row of SIZES
    qk_norm, swiglu, rope, rmsnorm  all on: iFSQ's DiT; all off: facebookresearch/DiT
    learn_sigma   2d output channels, only for facebookresearch checkpoints; the loss and the sampler below want d
    grad_checkpoint   recompute each block in backward: less memory, one more forward

    Public checkpoints load with strict=True; drop iFSQ's keys `projectors.*` first, they belong to REPA.
    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, *, input_size, in_channels, hidden_size, depth, num_heads, num_classes, patch_size=1, qk_norm=True,
                 swiglu=True, rope=True, rmsnorm=True, learn_sigma=False, grad_checkpoint=False):
        super().__init__()
        height, width = input_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"latent grid {height}x{width} does not divide by patch_size {patch_size}: change one of them")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} does not divide by num_heads {num_heads}: change one of them")
        if hidden_size % 4 or (rope and hidden_size // num_heads % 4):
            raise ValueError(f"2D positions need widths divisible by 4, got hidden_size {hidden_size} and "
                             f"{hidden_size // num_heads} per head: change hidden_size or num_heads")
        self.input_size, self.patch_size, self.in_channels = (height, width), patch_size, in_channels
        self.num_classes, self.grad_checkpoint = num_classes, grad_checkpoint
        self.dim, self.grid = hidden_size, (height // patch_size, width // patch_size)  # C, and rows and columns of tokens
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.register_buffer("pos_embed", sincos_positions(*self.grid, hidden_size))         # (1, T, C), fixed
        self.feat_rope = Rope2d(*self.grid, hidden_size // num_heads) if rope else None
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, qk_norm, swiglu, rmsnorm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, rmsnorm)
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # a view: the patch convolution starts like a linear map
                nn.init.zeros_(module.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        # adaLN-zero: every gate starts at 0, so each block starts as the identity, and the output starts at 0.
        for module in (*(block.adaLN_modulation[1] for block in self.blocks),
                       self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x, t, y, hidden_layer=None, drop=None):
        """Predict the velocity at x_t, and on request hand out hidden states (for REPA and for probes).

        x             (B,d,h,w) float, noisy latents x_t
        t             (B,) float in [0,1], 0 noise and 1 data
        y             (B,) int64 in [0, num_classes]; num_classes itself means "no label"
        hidden_layer  None, a layer k in 1..depth, or a sequence of such layers
        drop          (B,) bool, True where the label is to be forgotten (for classifier-free guidance), or None

        Returns the velocity (B,d,h,w) ((B,2d,h,w) with learn_sigma); with an int k the pair (velocity, state (B,T,C)
        after block k), with a sequence (velocity, list of states). Raises ValueError for a wrong shape or layer.
        """
        layers = (hidden_layer,) if isinstance(hidden_layer, int) else tuple(hidden_layer or ())
        self.check_inputs(x, t, y, layers)
        recompute = self.grad_checkpoint and torch.is_grad_enabled()
        x = self.x_embedder(x) + self.pos_embed                                         # (B, T, C)
        c = self.t_embedder(t) + self.y_embedder(y, drop)                               # (B, C) what adaLN listens to
        states = {}
        for k, block in enumerate(self.blocks, start=1):
            if recompute:
                x = checkpoint(block, x, c, self.feat_rope, use_reentrant=False)        # (B, T, C)
            else:
                x = block(x, c, self.feat_rope)                                         # (B, T, C)
            if k in layers:
                states[k] = x
        p, (h, w) = self.patch_size, self.input_size
        out = self.final_layer(x, c)                                                    # (B, T, p*p*d)
        out = out.unflatten(2, (p, p, -1)).unflatten(1, (h // p, w // p))               # (B, h/p, w/p, p, p, d)
        out = out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)                    # (B, d, h, w)
        if hidden_layer is None:
            return out
        return out, (states[hidden_layer] if isinstance(hidden_layer, int) else [states[k] for k in layers])

    def check_inputs(self, x, t, y, layers):
        """Shapes only: looking at values would make the host wait for the device."""
        if x.ndim != 4 or x.shape[1:] != (self.in_channels, *self.input_size):
            raise ValueError(f"latents of shape {tuple(x.shape)}, this DiT was built for (B, {self.in_channels}, "
                             f"{self.input_size[0]}, {self.input_size[1]}): check the tokenizer and the image size")
        if t.shape != x.shape[:1] or y.shape != x.shape[:1]:
            raise ValueError(f"t {tuple(t.shape)} and y {tuple(y.shape)} must have shape ({len(x)},), one value per latent")
        if any(not 1 <= k <= len(self.blocks) for k in layers):
            raise ValueError(f"hidden_layer {layers} is outside this DiT's layers: choose from 1 to {len(self.blocks)}")

    def flops_per_image(self):
        """Training FLOPs for one image (a multiply and an add are 2), an int: 3 x the matrix products of one forward.

            forward = 2*T*W + 2*V + 4*T*T*C*depth

        W: entries of the matrices applied to every token (patch embedding, qkv, attention output, feed-forward, final
        linear); V: of those applied once per image (time MLP, adaLN); the last term: q @ k^T and weights @ v. Backward
        is counted as 2 x forward. Not counted: norms, activations, softmax, biases, recomputation by grad_checkpoint.
        """
        tokens, width = self.pos_embed.shape[1:]
        matrices = {name: p.numel() for name, p in self.named_parameters() if p.ndim > 1 and "y_embedder" not in name}
        per_image = sum(n for name, n in matrices.items() if "adaLN" in name or "t_embedder" in name)
        per_token = sum(matrices.values()) - per_image
        return 3 * (2 * tokens * per_token + 2 * per_image + 4 * tokens**2 * width * len(self.blocks))


# ---- The loss: on the straight line x_t = (1-t) noise + t data, the velocity to predict is data - noise ----

def logit_normal_t(count, mean=0.0, std=1.0, generator=None, device=None):
    """Draw training times: (count,) float32 in (0,1), sigmoid of a Gaussian, so the middle of the path comes most often.

    `generator` must live on `device`. Source: arXiv 2403.03206, section 3.1; mean 0 and std 1 are iFSQ's.
    """
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))  # (count,)


def flow_matching_loss(model, x1, y, noise, t, cosine=True, drop=None, hidden_layer=None):
    """Flow-matching loss of a batch: the squared error of the velocity, and 1 - cos between predicted and true velocity.

    x1, noise     (B,d,h,w) float: clean normalised latents and standard Gaussian noise
    y, drop       (B,) int64 labels; (B,) bool labels to forget, or None
    t             (B,) float in [0,1], see `logit_normal_t`
    cosine        add the cosine term with weight 1, as iFSQ does; taken over the d latent dims at each position
    hidden_layer  passed on to the model

    Returns a dict: "loss" a scalar to call backward on; "mse" and (if asked) "cosine" (B,), detached, to log or to bin
    by t; and with hidden_layer "hidden", the model's states. All losses are computed in float32.
    """
    time = t.float()[:, None, None, None]                                               # (B, 1, 1, 1)
    x_t = (1 - time) * noise.float() + time * x1.float()                                # (B, d, h, w)
    target = x1.float() - noise.float()                                                 # (B, d, h, w)
    result = {}
    if hidden_layer is None:
        velocity = model(x_t, t, y, drop=drop)                                          # (B, d, h, w)
    else:
        velocity, result["hidden"] = model(x_t, t, y, hidden_layer=hidden_layer, drop=drop)
    terms = {"mse": (velocity.float() - target).square().mean(dim=(1, 2, 3))}           # (B,)
    if cosine:
        terms["cosine"] = (1 - F.cosine_similarity(velocity.float(), target, dim=1)).mean(dim=(1, 2))  # (B,)
    loss = sum(terms.values()).mean()                                                   # ()
    return {"loss": loss, **{name: term.detach() for name, term in terms.items()}, **result}


# ---- The sampler: follow dx/dt = velocity(x, t) from noise at t=0 to data at t=1 ----

def time_grid(steps, timestep_shift=1.0):
    """The steps + 1 times from 0 to 1 between which the sampler steps, as floats: t -> s*t / (1 + (s-1)*t), s the shift.

    s = 1 is uniform (the public iFSQ code writes 0 for it), s < 1 takes small steps near the noise, s > 1 near the data.
    As in arXiv 2403.03206, where t runs the other way, so that its shift is 1/s.
    Raises ValueError unless steps >= 1 and s > 0.
    """
    if steps < 1 or timestep_shift <= 0:
        raise ValueError(f"steps {steps} and timestep_shift {timestep_shift}: need steps >= 1 and a shift > 0 (1 = uniform)")
    uniform = [k / steps for k in range(steps + 1)]
    return [timestep_shift * t / (1 + (timestep_shift - 1) * t) for t in uniform]


def guided_velocity(model, x, t, labels, cfg_scale, guide_channels=None):
    """Classifier-free guidance: v = v_null + cfg_scale * (v_label - v_null), in one call of 2B rows (arXiv 2207.12598,
    whose weight w is cfg_scale - 1).

    x (B,d,h,w), t (B,), labels (B,) -> (B,d,h,w) float32. `guide_channels` k guides the first k channels and leaves the
    others conditional: facebookresearch/DiT and iFSQ do so with k = 3, also for 4 channels; None guides them all.
    """
    null = torch.full_like(labels, model.num_classes)                                   # (B,)
    both = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))       # (2B, d, h, w)
    cond, uncond = both.float().chunk(2)                                                # (B, d, h, w) each
    k = cond.shape[1] if guide_channels is None else guide_channels
    guided = uncond + cfg_scale * (cond - uncond)                                       # (B, d, h, w)
    return torch.cat([guided[:, :k], cond[:, k:]], dim=1)                               # (B, d, h, w)


@torch.no_grad()
def sample(model, noise, labels, steps=250, sampler="euler", cfg_scale=1.0, cfg_interval=(0.0, 1.0), timestep_shift=1.0,
           guide_channels=None):
    """Turn noise into latents: a deterministic ODE from t=0 to t=1, so a pure function of noise and labels.

    noise           (B,d,h,w), standard Gaussian; drawn per global sample index, any split into batches gives the same
    labels          (B,) int64 in [0, num_classes]
    steps, sampler  "euler": one model call per step, first order; "heun": two calls, second order
    cfg_scale       1 = no guidance (half the cost)
    cfg_interval    (lo, hi): guide only while lo <= t <= hi, elsewhere the model sees B rows, not 2B (arXiv 2404.07724)
    timestep_shift  see `time_grid`
    guide_channels  see `guided_velocity`

    Returns latents (B,d,h,w) float32, on the scale that the model was trained on. Raises ValueError for an unknown
    sampler or settings out of range. `model` is a DiT or any callable (x, t, labels) -> velocity with `num_classes`.
    """
    lo, hi = cfg_interval
    if sampler not in ("euler", "heun"):
        raise ValueError(f'unknown sampler "{sampler}": choose "euler" or "heun"')
    if not 0 <= lo <= hi <= 1:
        raise ValueError(f"cfg_interval ({lo}, {hi}) must satisfy 0 <= lo <= hi <= 1 (t=0 is noise, t=1 is data)")

    def velocity(x, time):
        t = torch.full((len(x),), time, dtype=torch.float32, device=x.device)           # (B,)
        if cfg_scale != 1.0 and lo <= time <= hi:
            return guided_velocity(model, x, t, labels, cfg_scale, guide_channels)      # (B, d, h, w)
        return model(x, t, labels).float()                                              # (B, d, h, w)

    x = noise.float()                                                                   # (B, d, h, w)
    times = time_grid(steps, timestep_shift)
    for now, then in zip(times[:-1], times[1:]):
        slope = velocity(x, now)                                                        # (B, d, h, w)
        if sampler == "heun":  # the mean of the slopes at both ends of the Euler step
            slope = (slope + velocity(x + (then - now) * slope, then)) / 2              # (B, d, h, w)
        x = x + (then - now) * slope                                                    # (B, d, h, w)
    return x
