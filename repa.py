"""REPA: lend a generator the eyes of a network that can already see, and probes that show what it does with them.

    image -+-> Tokenizer -> h x w tokens -> generator -> hidden state after layer k -> projector --+--> alignment_loss
           +-> teacher (frozen) -> h x w features of the clean image -------------------------------+

A generator spends much of its training on finding out what is in a picture. REPA tells it: each token's hidden state,
through a small MLP, shall point where the features of a vision encoder point at the same place. The term is added to
the generator's own loss; teacher and projector are gone when pictures are sampled. It fits both generators: in
LlamaGen the state at position i has seen the class and the tokens before i, and is aligned with patch i, which it is
about to predict. The teacher is DINOv2, or a small classifier of the data's own labels. This file needs torch alone.

Sources
  [1] Yu et al., "Representation Alignment for Generation", arXiv 2410.06940; github.com/sihyun-yu/REPA (the DiT side)
  [2] iFSQ, arXiv 2601.17124; github.com/Tencent-Hunyuan/iFSQ: REPA for autoregressive models, at about one third of
      the depth and with weight 2.0 where diffusion takes 0.5; self-token and next-token similarity
  [3] Oquab et al., "DINOv2", arXiv 2304.07193; Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588;
      github.com/facebookresearch/dinov2. The teacher; parameter names are kept, so its released weights load.
  [4] Huh et al., "The Platonic Representation Hypothesis", arXiv 2405.07987; github.com/minyoungg/platonic-rep: CKNNA

Shape letters: B images, H W pixels, h w token grid, N = h*w tokens, C width of a network, D width of the teacher's
features, M heads, P = C/M width of a head, R register tokens.

Usage
    import torch
    from repa import Classifier, make_projector, alignment_loss, cknna
    images, hidden = torch.rand(16, 3, 32, 32) * 2 - 1, torch.randn(16, 16, 128, requires_grad=True)
    teacher = Classifier(num_classes=10)      # train it first; or dinov2_from_state(torch.load("dinov2_vitb14_pretrain.pth"))
    projector = make_projector(128, teacher.dim)
    features = teacher.features(images, grid=(4, 4))                                  # (16, 16, D), no gradient
    (0.5 * alignment_loss(projector(hidden), features)).backward()
    print(cknna(hidden.mean(1), features.mean(1), topk=5))                            # one vector per image
"""
import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # name: (dim, depth, heads); all with 14 pixel patches
    "dinov2_vits14": (384, 12, 6),
    "dinov2_vitb14": (768, 12, 12),
    "dinov2_vitl14": (1024, 24, 16),
    "dinov2_vitg14": (1536, 40, 24),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---- The teacher of the paper: DINOv2 ----

class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, M, N, P) each
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, N, C)


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))                                            # (B, N, C)


class SwiGLU(nn.Module):
    """The feed-forward of ViT-g. Two thirds of 4C, so that it weighs what Mlp does, rounded up to a multiple of 8."""

    def __init__(self, dim):
        super().__init__()
        hidden = 8 * math.ceil(int(8 * dim / 3) / 8)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=2)                                       # (B, N, hidden) each
        return self.w3(F.silu(gate) * value)                                            # (B, N, C)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma                                                           # (B, N, C)


class Block(nn.Module):
    def __init__(self, dim, heads, swiglu):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim) if swiglu else Mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))                                      # (B, N, C)
        return x + self.ls2(self.mlp(self.norm2(x)))                                    # (B, N, C)


class DINOv2(nn.Module):
    """The vision transformer of [3], for inference with released weights (`dinov2_from_state` builds it from them).

    dim, depth, heads   see SIZES
    registers           R: 0, or 4 for the checkpoints named reg4
    swiglu              the feed-forward of ViT-g
    side                the position table is for side x side patches: 37 in all released files (518 pixels)
    patch               pixels of a patch
    """

    def __init__(self, dim, depth, heads, registers=0, swiglu=False, side=37, patch=14):
        super().__init__()
        self.dim, self.side, self.patch, self.registers = dim, side, patch, registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # of DINOv2's own training; unused, but part of every file
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch, stride=patch)))
        self.blocks = nn.ModuleList(Block(dim, heads, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, h, w, antialias):
        """The position table (1, 1 + h*w, C), class token first, resampled (bicubic) unless it is for h x w already.

        antialias=True resamples to h x w through a low-pass filter: DINOv2's own way for models with registers.
        False has no filter, and a scale that is 0.1 patch too large, an old guard against rounding that shifts the
        whole table: DINOv2's own way for models without.
        """
        if (h, w) == (self.side, self.side):
            return self.pos_embed                                                       # (1, 1 + N, C)
        first, table = self.pos_embed.float().split((1, self.side**2), dim=1)
        table = table.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)          # (1, C, side, side)
        if antialias:
            table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)   # (1, C, h, w)
        else:
            scale = (h + 0.1) / self.side, (w + 0.1) / self.side
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")            # (1, C, h, w)
        return torch.cat([first, table.flatten(2).mT], dim=1).type_as(self.pos_embed)   # (1, 1 + N, C)

    def forward(self, x, antialias=None):
        """x (B, 3, 14h, 14w) in ImageNet normalisation -> patch tokens (B,N,C) in reading order, class token (B,C) and
        registers (B,R,C), all after the last norm. antialias: see `positions`; None is as [3] does for this model.

        Raises ValueError unless both sides divide by the patch size.
        """
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        if x.shape[1:] != (3, h * self.patch, w * self.patch) or not h * w:
            raise ValueError(f"images {tuple(x.shape)}: DINOv2 wants (B, 3, H, W) with H and W multiples of {self.patch}")
        x = self.patch_embed(x.type_as(self.pos_embed)).flatten(2).mT                   # (B, N, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)                # (B, 1 + N, C)
        x = x + self.positions(h, w, self.registers > 0 if antialias is None else antialias)
        if self.registers:  # they have no position
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)  # (B, 1 + R + N, C)
        for block in self.blocks:
            x = block(x)                                                                # (B, 1 + R + N, C)
        x = self.norm(x)                                                                # (B, 1 + R + N, C)
        return x[:, 1 + self.registers :], x[:, 0], x[:, 1 : 1 + self.registers]

    @torch.no_grad()
    def features(self, images, grid):
        """What REPA aligns with: images (B,3,H,W) in [-1,1], token grid (h, w) -> patch tokens (B, h*w, C).

        With antialias=True whatever the model: the public code calls timm's resample_abs_pos_embed ([1] utils.py), which
        for models without registers is not what DINOv2 itself does, but is what the published results are made with.
        """
        return self(teacher_images(images, grid, self.patch), antialias=True)[0]        # (B, N, C)


def dinov2_url(name):
    """Where the weights of "dinov2_vitb14" or "dinov2_vitb14_reg" (the name in SIZES, or with _reg) are published [3].

    Raises ValueError for another name.
    """
    base = name.removesuffix("_reg")
    if base not in SIZES:
        raise ValueError(f'no teacher is called "{name}": choose from {", ".join(SIZES)}, or one of them with _reg')
    return f"https://dl.fbaipublicfiles.com/dinov2/{base}/{base}_{'reg4_' * (name != base)}pretrain.pth"


def dinov2_from_state(state, heads=None):
    """A frozen DINOv2 with the weights of a released file, whatever its size: everything is read off the shapes.

    state   what torch.load(path, weights_only=True) returns; its tensors become the model's
    heads   attention heads, which no shape tells; None: those of the released model of this size

    Raises ValueError unless every name and shape is as it should be.
    """
    if not {"pos_embed", "patch_embed.proj.weight"} <= state.keys():
        raise ValueError("this is no DINOv2 checkpoint: it has no pos_embed and patch_embed.proj.weight at its top level")
    dim, patch = state["patch_embed.proj.weight"].shape[::3]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    heads = heads or {size[:2]: size[2] for size in SIZES.values()}.get((dim, depth))
    if heads is None:
        raise ValueError(f"{depth} blocks of width {dim} are no released DINOv2 ({', '.join(SIZES)}): give heads")
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    with torch.device("meta"):  # no time and memory for weights that are replaced at once
        model = DINOv2(dim, depth, heads, registers, "blocks.0.mlp.w12.weight" in state, side, patch)
    shapes, wanted = ({key: tuple(v.shape) for key, v in s.items()} for s in (state, model.state_dict()))
    for key in sorted(shapes.keys() | wanted.keys()):
        if shapes.get(key) != wanted.get(key):
            raise ValueError(f"this is no DINOv2 checkpoint: {key} is {shapes.get(key)}, expected {wanted.get(key)}")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def teacher_images(x, grid, patch=14):
    """x (B,3,H,W) in [-1,1] -> float32 (B, 3, h*patch, w*patch) in ImageNet normalisation: one patch for each token.

    256 pixels with a 16 x 16 grid become 224 pixels. Bicubic, without antialias, after the normalisation: [1] train.py.
    Raises ValueError if x is no batch of RGB images, or if the grid has other proportions than the image.
    """
    if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
        raise ValueError(f"the teacher wants float images (B, 3, H, W) in [-1, 1], got {x.dtype} {tuple(x.shape)}")
    (H, W), (h, w) = x.shape[2:], grid
    if h < 1 or w < 1 or H * w != W * h:
        raise ValueError(f"a token grid of {h} x {w} does not fit an image of {H} x {W} pixels: H / h and W / w must be equal")
    x = x.float() * 0.5 + 0.5                                                           # (B, 3, H, W) in [0, 1]
    # Python numbers and no tensors of constants: copying those to a GPU would make the host wait for it.
    x = torch.stack([(x[:, i] - IMAGENET_MEAN[i]) / IMAGENET_STD[i] for i in range(3)], dim=1)  # (B, 3, H, W)
    return F.interpolate(x, size=(h * patch, w * patch), mode="bicubic", align_corners=False)  # (B, 3, h*patch, w*patch)


# ---- A teacher for small images and for machines without DINOv2's weights ----

class Residual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, dim), nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))                                           # (B, C, H, W)
        return x + self.conv2(F.silu(self.norm2(y)))                                    # (B, C, H, W)


class Classifier(nn.Module):
    """A small convolutional network that learns the labels of the data set itself, and then serves as the teacher.

    It knows far less than DINOv2: what the labels say. The logits are a linear map of the mean of the very features
    that are handed out, so whatever tells the classes apart is in them. No norm looks beyond an image, and so train and
    eval mode are the same. dim is the width D of the features, a multiple of 32. Raises ValueError for other sizes.
    """

    def __init__(self, num_classes, dim=128):
        super().__init__()
        if num_classes < 1 or dim < 32 or dim % 32:
            raise ValueError(f"num_classes {num_classes} and dim {dim}: want 1 or more classes and a multiple of 32 for dim")
        self.dim = dim
        self.body = nn.Sequential(nn.Conv2d(3, dim // 4, 4, stride=2, padding=1), Residual(dim // 4),
                                  nn.Conv2d(dim // 4, dim, 4, stride=2, padding=1), Residual(dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def map(self, images):
        """images (B,3,H,W) in [-1,1] -> the last feature map (B, H/4, W/4, D), normalised at each place."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 4:
            raise ValueError(f"the classifier wants images (B, 3, H, W) of 4 pixels or more, got {tuple(images.shape)}")
        return self.norm(self.body(images).movedim(1, 3))                               # (B, H/4, W/4, D)

    def forward(self, images):
        """images (B,3,H,W) in [-1,1], H and W at least 4 -> logits (B, num_classes)."""
        return self.head(self.map(images).mean(dim=(1, 2)))                             # (B, num_classes)

    @torch.no_grad()
    def features(self, images, grid):
        """images (B,3,H,W) in [-1,1], token grid (h, w) -> features (B, h*w, D) in float32, in reading order."""
        features = self.map(images).movedim(3, 1).float()                               # (B, D, H/4, W/4)
        # The filter averages where the grid is coarser than the map, and interpolates where it is finer.
        features = F.interpolate(features, size=tuple(grid), mode="bilinear", antialias=True)  # (B, D, h, w)
        return features.flatten(2).mT                                                   # (B, N, D)


# ---- Projector and loss ----

def make_projector(dim, teacher_dim, width=2048):
    """Hidden states (..., C) -> the width of the teacher (..., D): three linear layers with SiLU between, as in [1] and [2].

    The keys `projectors.0.*` of a public checkpoint, without that prefix, load into it with strict=True.
    """
    layers = nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, teacher_dim)
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


def alignment_loss(projected, features):
    """The REPA loss: the mean over images and tokens of -cos between projected hidden state and teacher feature.

    projected (B,N,D) from the projector, features (B,N,D) from the teacher (no gradient goes there), both float of any
    precision -> a float32 scalar in [-1, 1], -1 when all point the same way. Normalised in float32: in half
    precision the squares of large states overflow. With several teachers: the mean of their losses.
    Raises ValueError if the shapes differ. Source: [1] loss.py.
    """
    if projected.shape != features.shape:
        raise ValueError(f"projected states {tuple(projected.shape)} and teacher features {tuple(features.shape)} differ in "
                         "shape: the teacher's grid must be the token grid, and the projector as wide as the teacher")
    a = F.normalize(projected.float(), dim=-1)                                          # (B, N, D)
    b = F.normalize(features.detach().float(), dim=-1)                                  # (B, N, D)
    return -(a * b).sum(dim=-1).mean()                                                  # ()


# ---- Probes: what is in the hidden states? ----

def hsic(K, L, unbiased=True):
    """Hilbert-Schmidt independence criterion of two kernel matrices (N, N) -> scalar: how much they vary together.

    Unbiased: equation 5 of Song et al., JMLR 13 (2012), which leaves the diagonals out; N >= 4. Biased: trace(K H L H),
    H the centring matrix. Neither matrix has to be symmetric. Source: [4] metrics.py.
    """
    n = len(K)
    if not unbiased:
        centred = K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()      # (N, N) H K H
        return (centred * L.mT).sum()
    K, L = (matrix - matrix.diag().diag() for matrix in (K, L))                         # (N, N) each
    cross = (K.sum(0) * L.sum(1)).sum()                                                 # () sum of all entries of K @ L
    return ((K * L.mT).sum() + K.sum() * L.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


@torch.no_grad()
def cknna(a, b, topk=10, unbiased=True):
    """CKNNA of two sets of features of the same N things: do both have the same neighbours, at like distances?

    Kernel alignment (CKA) with inner products, on the pairs (i, j) where j is among the topk nearest of i in both.
    a (N,C), b (N,D) float -> float: 1 for equal features, about 0 for unrelated ones (unbiased=False counts each thing
    among its own neighbours, which lifts unrelated ones far above 0). Being near is one-sided, hence cknna(b, a) differs
    a little, as in the public code. nan if features come out negatively alike to themselves, possible for tiny topk.

    State with a value: N, topk (10 in [4]), what a row is (the mean over an image's tokens, or a token), and the scale:
    features are taken as they are, as in [2], while [4] clips outliers and scales to length 1 first. Computed in float64
    on the CPU with several N x N matrices: N = 5000 takes about 2 GB.
    Raises ValueError unless 2 <= topk < N, N >= 4 and both have N rows. Source: [4] metrics.py.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 4 or not 2 <= topk < len(a):
        raise ValueError(f"cknna of {tuple(a.shape)} and {tuple(b.shape)} with topk {topk}: want two matrices with the same "
                         "number of rows N >= 4, and 2 <= topk < N")
    kernels, masks = [], []
    for x in (a, b):
        x = x.cpu().double()                                                            # (N, D)
        kernels.append(x @ x.mT)                                                        # (N, N)
        others = kernels[-1].clone().fill_diagonal_(-math.inf) if unbiased else kernels[-1]
        nearest = others.topk(topk, dim=1).indices                                      # (N, topk)
        masks.append(torch.zeros_like(others).scatter_(1, nearest, 1.0))                # (N, N)

    def similarity(i, j):
        both = masks[i] * masks[j]                                                      # (N, N) 1: a neighbour in both
        return hsic(both * kernels[i], both * kernels[j], unbiased)

    return (similarity(0, 1) / ((similarity(0, 0) * similarity(1, 1)).sqrt() + 1e-6)).item()


@torch.no_grad()
def token_similarity(states, shift):
    """Mean cosine between the state h_l[i] of each layer l and the final state h_final[i + shift] in reading order.

    shift 0 is self-token similarity (STS): how near is a state to what it becomes? shift 1 is next-token similarity
    (NTS): how much of the next token does it hold already? Source: [2].
    states  a list of hidden states (B,T,C), one per layer, the last layer's last -> a list of floats in [-1, 1]

    The mean is over images and over the T - shift tokens that have a partner, in float32. Raises ValueError for
    other shapes and unless 0 <= shift < T.
    """
    shapes = {tuple(h.shape) for h in states}
    if len(shapes) != 1 or states[0].ndim != 3 or not 0 <= shift < states[0].shape[1]:
        raise ValueError(f"want hidden states of one shape (B, T, C) and 0 <= shift < T, got {sorted(shapes)} and {shift}")
    final = F.normalize(states[-1][:, shift:].float(), dim=-1)                          # (B, T - shift, C)
    cosines = [(F.normalize(h[:, : final.shape[1]].float(), dim=-1) * final).sum(-1).mean() for h in states]
    return torch.stack(cosines).tolist()
