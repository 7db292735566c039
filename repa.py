"""REPA: train a generator faster by aligning its hidden states with a pretrained vision encoder.

A generator spends much of its training learning what is in an image. REPA supplies that knowledge:
a small MLP (the projector) maps each token's hidden state after layer k to the feature space of a
frozen encoder (the teacher), and a cosine loss pulls it towards the teacher's feature of the same
image patch. The loss is added to the generator's own. Neither teacher nor projector is needed for
sampling.

In LlamaGen, the state at position i has seen the class and the tokens before i, and is aligned with
patch i, the one it is about to predict. The teacher is DINOv2 or, for small images and offline
machines, a classifier trained on the data set. This file needs only torch.

Sources
  [1] Yu et al., "Representation Alignment for Generation", arXiv 2410.06940;
      github.com/sihyun-yu/REPA
  [2] iFSQ, arXiv 2601.17124; github.com/Tencent-Hunyuan/iFSQ: REPA for autoregressive models, at
      one third of the depth with weight 2.0 (for diffusion the weight is 0.5); self- and next-token
      similarity
  [3] Oquab et al., "DINOv2", arXiv 2304.07193; Darcet et al., "Vision Transformers Need Registers",
      arXiv 2309.16588; github.com/facebookresearch/dinov2, whose parameter names are kept
  [4] Huh et al., "The Platonic Representation Hypothesis", arXiv 2405.07987;
      github.com/minyoungg/platonic-rep: CKNNA

Shape letters: B batch, T = h*w tokens, C width, N heads, D = C/N width of a head, F width of the
teacher's features, R register tokens, H W pixels, h w token grid.

Usage
    import torch
    from repa import Classifier, alignment_loss, cknna, make_projector
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    hidden = torch.randn(16, 16, 128, requires_grad=True)           # of a generator, (B, T, C)
    teacher = Classifier(num_classes=10)                            # or load_dinov2(...)
    projector = make_projector(128, teacher.dim)
    features = teacher.features(images, grid=(4, 4))                # (16, 16, F), no gradient
    loss = 0.5 * alignment_loss(projector(hidden), features)
    loss.backward()
    print(cknna(hidden.mean(1), features.mean(1), topk=5))          # one vector per image
"""
import itertools
import math
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SIZES = {  # name: (depth, width, heads); all with patches of 14 pixels
    "dinov2_vits14": (12, 384, 6),
    "dinov2_vitb14": (12, 768, 12),
    "dinov2_vitl14": (24, 1024, 16),
    "dinov2_vitg14": (40, 1536, 24),
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
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1))    # (B, T, 3, N, D)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                   # (B, N, T, D) each
        out = F.scaled_dot_product_attention(q, k, v)          # (B, N, T, D)
        out = out.transpose(1, 2).flatten(2)                   # (B, T, C)
        return self.proj(out)                                  # (B, T, C)


def mlp(dim):
    fc1, fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
    return nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))


class SwiGLU(nn.Module):
    """The feed-forward layer of ViT-g: three matrices, 2/3 as wide, rounded up to 8."""

    def __init__(self, dim):
        super().__init__()
        hidden = 8 * math.ceil(int(8 * dim / 3) / 8)
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=2)              # (B, T, hidden) each
        return self.w3(F.silu(gate) * value)                   # (B, T, C)


class Block(nn.Module):
    def __init__(self, dim, heads, swiglu):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim) if swiglu else mlp(dim)
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(dim)})

    def forward(self, x):
        update = self.attn(self.norm1(x))                      # (B, T, C)
        x = x + self.ls1["gamma"] * update
        update = self.mlp(self.norm2(x))                       # (B, T, C)
        return x + self.ls2["gamma"] * update


class DINOv2(nn.Module):
    """The vision transformer of [3], for inference. `load_dinov2` builds it from a released file.

    depth, dim, heads   see SIZES
    registers           R: 0, or 4 for the files named reg4
    swiglu              the feed-forward layer of ViT-g
    side                the position table has side x side patches: 37 in released files
    patch               pixels of a patch
    """

    def __init__(self, *, depth, dim, heads, registers=0, swiglu=False, side=37, patch=14):
        super().__init__()
        self.dim, self.side, self.patch, self.registers = dim, side, patch, registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side**2, dim))
        if registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))  # unused here, but in every file
        patches = nn.Conv2d(3, dim, patch, stride=patch)
        self.patch_embed = nn.Sequential(OrderedDict(proj=patches))
        self.blocks = nn.ModuleList(Block(dim, heads, swiglu) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, h, w, antialias):
        """The position table (1, 1 + h*w, C), class token first, resampled to h x w (bicubic).

        antialias=True filters the table, as DINOv2 does for models with registers. For models
        without, DINOv2 takes no filter and a scale that is 0.1 patches too large: antialias=False.
        """
        if (h, w) == (self.side, self.side):
            return self.pos_embed                              # (1, 1 + T, C)
        first, table = self.pos_embed.float().split([1, self.side**2], dim=1)
        table = table.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        if antialias:
            table = F.interpolate(table, size=(h, w), mode="bicubic", antialias=True)
        else:
            scale = ((h + 0.1) / self.side, (w + 0.1) / self.side)
            table = F.interpolate(table, scale_factor=scale, mode="bicubic")
        table = torch.cat([first, table.flatten(2).mT], dim=1)
        return table.type_as(self.pos_embed)                   # (1, 1 + T, C)

    def forward(self, x, antialias=None):
        """x (B, 3, H, W) in ImageNet normalisation -> patch tokens (B,T,C), class token (B,C) and
        registers (B,R,C), all after the last norm.

        antialias: see `positions`; None does as [3] does for this model. Raises ValueError unless H
        and W are multiples of the patch size.
        """
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        if x.shape[1:] != (3, h * self.patch, w * self.patch) or h * w == 0:
            raise ValueError(f"images {tuple(x.shape)}: DINOv2 wants (B, 3, H, W) with H and W "
                             f"multiples of {self.patch}")
        if antialias is None:
            antialias = self.registers > 0
        x = self.patch_embed(x.type_as(self.pos_embed)).flatten(2).mT             # (B, T, C)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)          # (B, 1 + T, C)
        x = x + self.positions(h, w, antialias)
        if self.registers:  # they have no position
            registers = self.register_tokens.expand(len(x), -1, -1)           # (B, R, C)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)             # (B, 1 + R + T, C)
        for block in self.blocks:
            x = block(x)
        cls, registers, patches = self.norm(x).split([1, self.registers, h * w], dim=1)
        return patches, cls[:, 0], registers

    @torch.no_grad()
    def features(self, images, grid):
        """images (B,3,H,W) in [-1,1], token grid (h, w) -> features (B, h*w, F) in reading order.

        With antialias=True for all models, because the published results were made in this way: [1]
        calls timm's resample_abs_pos_embed.
        """
        x = teacher_images(images, grid, self.patch)
        return self(x, antialias=True)[0]                      # (B, T, F)


def teacher_images(images, grid, patch=14):
    """images (B,3,H,W) in [-1,1] -> (B, 3, h*patch, w*patch) fp32 in ImageNet normalisation.

    The teacher then has one patch for each token: 256 pixels with a grid of 16 x 16 become 224. The
    resize is bicubic without antialias and follows the normalisation, as in [1] train.py.
    Raises ValueError if these are not RGB images or the grid has other proportions than the image.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError("the teacher wants float images (B, 3, H, W) in [-1, 1], got "
                         f"{images.dtype} {tuple(images.shape)}")
    (H, W), (h, w) = images.shape[2:], grid
    if h < 1 or w < 1 or H * w != W * h:
        raise ValueError(f"a token grid of {h} x {w} does not fit an image of {H} x {W} pixels: "
                         "H / h and W / w must be equal")
    images = images.float() * 0.5 + 0.5                        # (B, 3, H, W) in [0, 1]
    channels = []
    for i in range(3):  # copying a tensor of constants to a GPU would make the host wait
        channels.append((images[:, i] - IMAGENET_MEAN[i]) / IMAGENET_STD[i])
    x = torch.stack(channels, dim=1)                           # (B, 3, H, W)
    return F.interpolate(x, size=(h * patch, w * patch), mode="bicubic")


def dinov2_url(name):
    """The URL of the published weights [3] of a name in SIZES, or of such a name with _reg.

    Raises ValueError for another name.
    """
    base = name.removesuffix("_reg")
    if base not in SIZES:
        raise ValueError(f'"{name}" is neither a file nor the name of a teacher: choose from '
                         f"{', '.join(SIZES)}, or one of these with _reg")
    stem = name.replace("_reg", "_reg4")
    return f"https://dl.fbaipublicfiles.com/dinov2/{base}/{stem}_pretrain.pth"


def load_dinov2(name_or_path, folder):
    """A frozen DINOv2 from a file, or by name: "dinov2_vitb14", "dinov2_vitb14_reg", ...

    A name's file is looked for in `folder`, and downloaded into it if it is not there. A file that
    has been moved into `folder` is found there by its own name.
    Raises ValueError, in one line, if the name is unknown or the weights cannot be loaded.
    """
    path, options = Path(name_or_path), dict(map_location="cpu", weights_only=True)
    if not path.is_file():
        path = Path(folder, path.name)
    source = path if path.is_file() else dinov2_url(str(name_or_path))
    try:
        if path.is_file():
            state = torch.load(path, **options)
        else:
            state = torch.hub.load_state_dict_from_url(source, folder, progress=False, **options)
        return dinov2_from_state(state)
    except Exception as error:  # a damaged file can raise almost anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"cannot load DINOv2 from {source} ({cause[:400]}): put the published "
                         f"file into {folder}, or name its path") from error


def dinov2_from_state(state, heads=None):
    """A frozen DINOv2 with the tensors of a released state dict, whose shapes tell its size.

    heads   used only if no row of SIZES has this depth and width
    Raises ValueError or RuntimeError unless every name and shape is as it should be; `load_dinov2`
    turns everything that a damaged file raises here into a ValueError.
    """
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        raise ValueError("not a DINOv2: no pos_embed and patch_embed.proj.weight at the top level")
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    known = {size[:2]: size[2] for size in SIZES.values()}
    heads = known.get((depth, dim), heads)
    if heads is None:
        raise ValueError(f"no released DINOv2 has {depth} blocks of width {dim}")
    with torch.device("meta"):  # takes no time and memory: all weights are replaced at once
        model = DINOv2(
            depth=depth, dim=dim, heads=heads, registers=registers, patch=patch,
            side=math.isqrt(state["pos_embed"].shape[1] - 1),
            swiglu="blocks.0.mlp.w12.weight" in state)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


# ---- A teacher for small images and for machines without DINOv2's weights ----

class Residual(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))                  # (B, C, H, W)
        y = self.conv2(F.silu(self.norm2(y)))                  # (B, C, H, W)
        return x + y


class Classifier(nn.Module):
    """A small convolutional network that learns the data set's labels, then serves as the teacher.

    The logits are a linear map of the mean of the features, so the features contain whatever tells
    the classes apart. No layer behaves differently in train and eval mode.
    dim is the feature width F, a multiple of 32. Raises ValueError for other sizes.
    """

    def __init__(self, num_classes, dim=128):
        super().__init__()
        if num_classes < 1 or dim < 32 or dim % 32:
            raise ValueError(f"num_classes {num_classes}, dim {dim}: want 1 or more classes, and a "
                             "multiple of 32 for dim")
        self.dim = dim
        self.body = nn.Sequential(
            nn.Conv2d(3, dim // 4, 4, stride=2, padding=1), Residual(dim // 4),
            nn.Conv2d(dim // 4, dim, 4, stride=2, padding=1), Residual(dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def map(self, images):
        """images (B,3,H,W) in [-1,1] -> the last feature map (B, H/4, W/4, F), after its norm."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 4:
            raise ValueError("the classifier wants images (B, 3, H, W) of 4 pixels or more, got "
                             f"{tuple(images.shape)}")
        return self.norm(self.body(images).movedim(1, 3))      # (B, H/4, W/4, F)

    def forward(self, images):
        """images (B,3,H,W) in [-1,1], H and W at least 4 -> logits (B, num_classes)."""
        pooled = self.map(images).mean(dim=(1, 2))             # (B, F)
        return self.head(pooled)                               # (B, num_classes)

    @torch.no_grad()
    def features(self, images, grid):
        """images (B,3,H,W) in [-1,1], grid (h, w) -> features (B, h*w, F) fp32, reading order."""
        x = self.map(images).movedim(3, 1).float()             # (B, F, H/4, W/4)
        # antialias averages where the grid is coarser than the map.
        x = F.interpolate(x, size=tuple(grid), mode="bilinear", antialias=True)
        return x.flatten(2).mT                                 # (B, T, F)


def random_shift(images):
    """Shift a batch (B,3,H,W) by up to a tenth of its shorter side, reflecting at the edges.

    The shift is the same for the whole batch and comes from torch's global generator.
    """
    H, W = images.shape[2:]
    margin = min(H, W) // 10
    down, right = torch.randint(2 * margin + 1, (2,)).tolist()
    padded = F.pad(images, (margin, margin, margin, margin), mode="reflect")
    return padded[:, :, down : down + H, right : right + W]    # (B, 3, H, W)


def train_classifier(model, batches, optimizer, steps):
    """Train a Classifier, in place, with cross-entropy (label smoothing 0.1) on shifted images.

    batches    endlessly many pairs of images (B,3,H,W) float in [-1,1] and labels (B,) int64, on
               the model's device
    steps      1 or more
    optimizer  its learning rates are reached after a tenth of the steps, then fall linearly to 0
    Raises FloatingPointError, in one line, if the loss is not finite at the end.
    """
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)))
    model.train()
    for images, labels in itertools.islice(batches, steps):
        logits = model(random_shift(images))                   # (B, num_classes)
        loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    if not loss.isfinite():
        raise FloatingPointError(f"the classifier's loss is {loss.item()} after {steps} steps: "
                                 "lower its learning rate")


@torch.no_grad()
def accuracy(model, batches):
    """The share, in [0,1], of images that a Classifier labels correctly.

    batches    as in `train_classifier`, but finite
    """
    correct = total = 0
    for images, labels in batches:
        predicted = model(images).argmax(dim=1)                # (B,)
        correct += (predicted == labels).sum().item()
        total += len(labels)
    return correct / total


# ---- Projector and loss ----

def make_projector(dim, teacher_dim, width=2048):
    """Hidden states (..., C) -> (..., F): three linear layers with SiLU between, as in [1] and [2].

    The keys `projectors.0.*` of a public checkpoint, without that prefix, load into it strictly.
    """
    layers = [nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, teacher_dim)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


class Aligned(nn.Module):
    """A generator and its projector as one module, so that DDP averages the gradients of both.

    Called with the generator's arguments, hidden_layer among them, it returns the generator's
    output and the projected hidden state (B,T,F).
    """

    def __init__(self, model, projector):
        super().__init__()
        self.model, self.projector = model, projector

    def forward(self, *args, **kwargs):
        output, hidden = self.model(*args, **kwargs)
        return output, self.projector(hidden)                  # (B, T, F)


def alignment_loss(projected, features):
    """The REPA loss: the mean over images and tokens of -cos(projected state, teacher's feature).

    projected (B,T,F) and features (B,T,F, no gradient), float -> a scalar in [-1, 1], computed in
    fp32, since squares of large states overflow in half precision.
    Raises ValueError if the shapes differ. Source: [1] loss.py.
    """
    if projected.shape != features.shape:
        raise ValueError(f"projected states {tuple(projected.shape)} and teacher features "
                         f"{tuple(features.shape)} differ in shape: the teacher's grid must be the "
                         "token grid, and the projector as wide as the teacher")
    cosines = F.cosine_similarity(projected.float(), features.detach().float(), dim=-1)
    return -cosines.mean()                                     # ()


# ---- Probes: what do the hidden states contain? ----

def hsic(K, L, unbiased=True):
    """Hilbert-Schmidt independence criterion of two kernel matrices (n, n) -> scalar.

    It says how much the two vary together. Unbiased: equation 5 of Song et al., JMLR 13 (2012),
    which leaves out the diagonals; n >= 4. Biased: trace(K H L H), with the centring matrix H. The
    matrices need not be symmetric. Source: [4] metrics.py.
    """
    n = len(K)
    if not unbiased:
        centred = K - K.mean(0, keepdim=True) - K.mean(1, keepdim=True) + K.mean()    # H K H
        return (centred * L.mT).sum()
    K, L = K - K.diag().diag(), L - L.diag().diag()
    trace = (K * L.mT).sum()                                   # of K @ L
    cross = (K.sum(0) * L.sum(1)).sum()                        # the sum of all entries of K @ L
    means = K.sum() * L.sum() / ((n - 1) * (n - 2))
    return (trace + means - 2 * cross / (n - 2)) / (n * (n - 3))


@torch.no_grad()
def cknna(a, b, topk=10, unbiased=True):
    """CKNNA: whether two sets of features of the same n things have the same neighbours. A float.

    This is kernel alignment (CKA) with inner products, on the pairs (i, j) where in both sets j has
    one of the topk largest inner products with i: 1 for equal features, about 0 for unrelated ones.
    With unbiased=False a thing may be its own neighbour, so unrelated features score far above 0.
    cknna(b, a) differs slightly, as in the public code. nan is possible for very small topk.

    a (n,C), b (n,F) float, taken as they are, as in [2]; [4] clips and normalises them first.
    Report n, topk (10 in [4]) and what a row is (an image's mean token, or a token) with a value.
    Computed in float64 on the CPU, with several n x n matrices: n = 5000 takes about 2 GB.
    Raises ValueError unless 2 <= topk < n, n >= 4 and both have n rows. Source: [4] metrics.py.
    """
    n = len(a)
    if a.ndim != 2 or b.ndim != 2 or len(b) != n or n < 4 or not 2 <= topk < n:
        raise ValueError(f"cknna of {tuple(a.shape)} and {tuple(b.shape)} with topk {topk}: want "
                         "two matrices with the same number of rows n >= 4, and 2 <= topk < n")

    def kernel_and_neighbours(x):
        x = x.cpu().double()
        kernel = x @ x.mT                                      # (n, n)
        others = kernel.clone()
        if unbiased:
            others.fill_diagonal_(-math.inf)
        nearest = others.topk(topk, dim=1).indices             # (n, topk)
        return kernel, torch.zeros_like(kernel).scatter_(1, nearest, 1.0)  # (n, n) of 0 and 1

    (kernel_a, near_a), (kernel_b, near_b) = kernel_and_neighbours(a), kernel_and_neighbours(b)
    both = near_a * near_b                                     # 1 for neighbours in both sets
    similarity = hsic(both * kernel_a, both * kernel_b, unbiased)
    own_a = hsic(near_a * kernel_a, near_a * kernel_a, unbiased)
    own_b = hsic(near_b * kernel_b, near_b * kernel_b, unbiased)
    return (similarity / ((own_a * own_b).sqrt() + 1e-6)).item()


@torch.no_grad()
def token_similarity(states, shift):
    """Mean cosine between state h_l[i] of each layer l and the final state h_final[i + shift].

    shift 0 is self-token similarity (STS): how near a state is to what it becomes. shift 1 is
    next-token similarity (NTS): how much of the next token it contains. Source: [2].
    states  one (B,T,C) per layer, the last layer's last -> a list of floats in [-1, 1]

    The mean is over images and the T - shift tokens that have a partner, in fp32. Raises ValueError
    for other shapes and unless 0 <= shift < T.
    """
    shapes = {tuple(h.shape) for h in states}
    if len(shapes) != 1 or states[0].ndim != 3 or not 0 <= shift < states[0].shape[1]:
        raise ValueError("want hidden states of one shape (B, T, C) and 0 <= shift < T, got "
                         f"{sorted(shapes)} and {shift}")
    final = states[-1][:, shift:].float()                      # (B, T - shift, C)
    means = []
    for h in states:
        cosines = F.cosine_similarity(h[:, : final.shape[1]].float(), final, dim=-1)
        means.append(cosines.mean().item())
    return means
