"""LlamaGen: a Llama that writes pictures, one code index after the other, in reading order.

    image -> Tokenizer -> h x w integers --[ this file ]--> h x w new integers -> Tokenizer.decode -> picture

The grid of an image is one sentence, started by the class: p(indices | class) = product over i of p(index_i | class, all
indices before i), trained with cross-entropy and sampled token by token. This file needs torch alone: copy it.

Sources
  [1] Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", arXiv 2406.06525;
      github.com/FoundationVision/LlamaGen. The network; parameter names are kept, so its class-conditional weights load.
  [2] iFSQ, arXiv 2601.17124; github.com/Tencent-Hunyuan/iFSQ. Multi-index tokens and their factorised head.

Multi-index tokens. Four iFSQ channels of 17 levels make 17^4 = 83,521 codes, too many for one softmax: its two tables
would outweigh a small network, and most codes are too rare to train them. But such an index is a number in base 17, so it
can be cut into digits: (channels 0, 1) and (channels 2, 3), each in base 17^2 = 289. A token then enters as the sum of
two embeddings and leaves through two softmaxes over 289, the second of which sees what the first one drew.

Shape letters: B images, T = h*w tokens of an image, C width, N heads, D = C/N width of a head, G digits of a token (1
unless multi-index), V vocabulary of a digit.

Usage
    import torch
    from llamagen import SIZES, LlamaGen, cross_entropy, sample
    n_layer, n_head, dim = SIZES["nano"]
    model = LlamaGen(grid=(4, 4), vocab_sizes=[25, 25], num_classes=10, n_layer=n_layer, n_head=n_head, dim=dim)
    labels, indices = torch.randint(10, (8,)), torch.randint(625, (8, 16))
    cross_entropy(model(labels, indices), indices).backward()
    images = sample(model.eval(), labels, torch.rand(8, 16, 2), cfg_scale=2.0)        # (8, 16), each in [0, 625)
"""
import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIZES = {  # name: (n_layer, n_head, dim), as in [1] and [2]; nano is ours, small enough for a laptop
    "nano": (12, 4, 128),
    "S": (12, 12, 384),
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


# ---- One index as several digits ----

def group_vocab(levels, groups):
    """Vocabulary of each of `groups` digits when runs of FSQ channels share one: [17, 17, 17, 17], 2 -> [289, 289].

    levels: the number of levels of each channel, least significant first. ValueError if they cannot be dealt out evenly.
    """
    if groups < 1 or len(levels) % groups:
        raise ValueError(f"{len(levels)} channels cannot be cut into {groups} groups: give a divisor of {len(levels)}")
    run = len(levels) // groups
    return [math.prod(levels[i : i + run]) for i in range(0, len(levels), run)]


def split_index(indices, vocab_sizes):
    """One integer per token -> its digits in the mixed radix `vocab_sizes`, the first one the least significant.

    indices (...) int64 in [0, product of vocab_sizes) -> digits (..., G) int64, digit g in [0, vocab_sizes[g]). Exact:
    integers only. An index that is too large or negative leaves its last digit out of range, where an embedding
    lookup notices it; it is never wrapped round into a valid code. Raises ValueError on another dtype.
    """
    if indices.dtype != torch.int64:
        raise ValueError(f"indices are {indices.dtype}, digits are exact in int64 only: pass indices.long()")
    digits = []
    for size in vocab_sizes[:-1]:
        digits.append(indices % size)
        indices = indices // size
    return torch.stack((*digits, indices), -1)


def join_index(digits, vocab_sizes):
    """The inverse of split_index: digits (..., G) int64 -> index (...) = d_0 + V_0 * (d_1 + V_1 * (d_2 + ...)).

    Raises ValueError if the last axis is not G = len(vocab_sizes) or the dtype is not int64.
    """
    if digits.shape[-1] != len(vocab_sizes) or digits.dtype != torch.int64:
        raise ValueError(f"want int64 digits (..., {len(vocab_sizes)}), got {digits.dtype} {tuple(digits.shape)}")
    index = digits[..., -1]
    for g in reversed(range(len(vocab_sizes) - 1)):
        index = index * vocab_sizes[g] + digits[..., g]
    return index


# ---- Where a token stands: 2D rotary embedding ----

def rope_table(h, w, head_dim, base=10000.0, device=None):
    """cos and sin of every rotation: (1 + h*w, D/2, 2) fp32. Row 0 is the class token, row 1 + y*w + x is position (y, x).

    A head has D/2 pairs of channels; the first half of the pairs turns with y, the second half with x.
    The class row is all zeros, not cos = 1: it erases q and k of the class token instead of leaving them unturned, so
    every position gives it the score 0 and reads it through its value alone. It looks like an accident, but the
    released weights are trained with it ([1], precompute_freqs_cis_2d).
    """
    quarter = head_dim // 4
    speed = base ** -(torch.arange(quarter, device=device, dtype=torch.float32) / quarter)                 # (D/4,)
    y = (torch.arange(h, device=device)[:, None] * speed)[:, None].expand(h, w, quarter)                   # (h, w, D/4)
    x = (torch.arange(w, device=device)[:, None] * speed)[None].expand(h, w, quarter)                      # (h, w, D/4)
    angle = torch.cat((y, x), -1).flatten(0, 1)                                                            # (T, D/2)
    return F.pad(torch.stack((angle.cos(), angle.sin()), -1), (0, 0, 0, 0, 1, 0))                          # (1 + T, D/2, 2)


def rotate(x, rope):
    """Turn the neighbouring channel pairs (0,1), (2,3), ... of x (..., T, D) by rope (T, D/2, 2), in fp32 since rope is."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                                                     # (..., T, D/2)
    cos, sin = rope.unbind(-1)                                                                             # (T, D/2)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2).type_as(x)                  # (..., T, D)


# ---- The network ----

class KVCache:
    """Keys and values that one layer has computed so far, for the length of one batch of samples.

    A plain object that is handed down the layers: it never enters a state dict. Reads return a view of the filled
    part, so that a step costs what its position costs and needs no mask over empty places.
    """

    def __init__(self, length):
        self.length, self.used, self.k, self.v = length, 0, None, None

    def append(self, k, v):
        """k, v (B, N, 1, D) of the next position -> all keys and values up to it, (B, N, used, D)."""
        if self.k is None:  # only here are batch, dtype (autocast!) and device known
            self.k, self.v = (k.new_empty(*k.shape[:2], self.length, k.shape[-1]) for _ in "kv")
        self.k[:, :, self.used] = k[:, :, 0]
        self.v[:, :, self.used] = v[:, :, 0]
        self.used += 1
        return self.k[:, :, : self.used], self.v[:, :, : self.used]

    def keep_rows(self, rows):
        """Forget all but the first `rows` of the batch."""
        self.k, self.v = self.k[:rows], self.v[:rows]


class Attention(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None):
        qkv = self.wqkv(x).unflatten(-1, (3 * self.n_head, -1)).transpose(-2, -3)                          # (..., 3N, T, D)
        qk, v = qkv.split((2 * self.n_head, self.n_head), dim=-3)                                          # 2N and N of 3N
        q, k = rotate(qk, rope).chunk(2, dim=-3)                                                           # (..., N, T, D)
        if cache is not None:
            k, v = cache.append(k, v)                                                                      # (B, N, used, D)
        # With a cache the one query is the newest position: it may see everything there is.
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)                             # (..., N, T, D)
        return self.resid_dropout(self.wo(out.transpose(-2, -3).flatten(-2)))                              # (..., T, C)


class FeedForward(nn.Module):
    """SwiGLU. Two thirds of 4C, so that three matrices weigh as much as the usual two, rounded up to 256 as in [1]."""

    def __init__(self, dim, dropout):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.ffn_dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))                                  # (..., T, C)


class Block(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.attention = Attention(dim, n_head, dropout)
        self.feed_forward = FeedForward(dim, dropout)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, x, rope, cache=None):
        x = x + self.attention(self.attention_norm(x), rope, cache)                                        # (..., T, C)
        return x + self.feed_forward(self.ffn_norm(x))                                                     # (..., T, C)


class LabelEmbedding(nn.Module):
    """One row per class, and row `num_classes` for "no class", which guidance compares with. It always exists; the public
    code leaves it out when its label dropout is 0, so weights trained in that way do not fit (no released ones were)."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels, drop=None):
        if drop is not None:
            labels = torch.where(drop, self.num_classes, labels)                                           # (B,)
        return self.embedding_table(labels)[:, None]                                                       # (B, 1, C)


class LlamaGen(nn.Module):
    """Class and indices in, logits of every index out.

    grid            (h, w) of the latent image, not necessarily square
    vocab_sizes     one int per digit of a token: [V] is plain LlamaGen, [289, 289] a multi-index token (split_index)
    num_classes     1 or more; an unconditional model is one with a single class
    n_layer, n_head, dim   see SIZES
    head_layers     blocks of the factorised head, used only if a token has several digits; 2 as in [2]
    dropout         on embeddings, attention output and feed-forward output; 0.1 as in [1]
    class_dropout   share of labels replaced by "no class" in training; 0.1 as in [1]. With 0, row `num_classes` stays
                    at its initialisation and guidance has nothing to compare with: sample with cfg_scale=1
    grad_checkpoint recompute each block in the backward pass instead of storing what is inside it

    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, *, grid, vocab_sizes, num_classes, n_layer, n_head, dim, head_layers=2, dropout=0.1,
                 class_dropout=0.1, grad_checkpoint=False):
        super().__init__()
        self.grid, self.vocab_sizes, self.num_classes = tuple(grid), tuple(vocab_sizes), num_classes
        self.n_head, self.dim = n_head, dim
        self.class_dropout, self.grad_checkpoint = class_dropout, grad_checkpoint
        self._check_sizes()
        self.cls_embedding = LabelEmbedding(num_classes, dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(dim, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        several = len(vocab_sizes) > 1  # the public code has other parameter names then
        self.factorized_blocks = nn.ModuleList(Block(dim, n_head, dropout) for _ in range(head_layers if several else 0))
        if several:
            for g, size in enumerate(vocab_sizes):
                self.add_module(f"{g}_emb", nn.Embedding(size, dim))
            self.output = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in vocab_sizes)
        else:
            self.tok_embeddings = nn.Embedding(vocab_sizes[0], dim)
            self.output = nn.Linear(dim, vocab_sizes[0], bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for output in self.outputs:
            nn.init.zeros_(output.weight)  # training starts at the uniform distribution: loss = log V

    def _check_sizes(self):
        (h, w), G = self.grid, len(self.vocab_sizes)
        if h < 1 or w < 1 or self.num_classes < 1:
            raise ValueError(f"grid {self.grid}, num_classes {self.num_classes}: want 1 or more (unconditional = 1 class)")
        if G == 0 or min(self.vocab_sizes) < 1 or math.prod(self.vocab_sizes) > 2**63 - 1:
            raise ValueError(f"vocab_sizes {self.vocab_sizes}: give one or several ints >= 1 whose product fits an int64")
        if self.dim % (4 * self.n_head):
            raise ValueError(f"dim {self.dim} is no multiple of 4 * {self.n_head} heads: RoPE turns pairs in y and in x")
        if G > h * w:
            raise ValueError(f"{G} digits need {G} positions, grid {self.grid} has {h * w}: the head shares its RoPE rows")

    @property
    def tables(self):
        """The embedding table of each digit."""
        G = len(self.vocab_sizes)
        return [getattr(self, f"{g}_emb") for g in range(G)] if G > 1 else [self.tok_embeddings]

    @property
    def outputs(self):
        """The output layer of each digit."""
        return self.output if len(self.vocab_sizes) > 1 else [self.output]

    def embed(self, digits):
        """Digits (B, T, G) int64 -> token embeddings (B, T, C): a sum, one table per digit."""
        return sum(table(digits[..., g]) for g, table in enumerate(self.tables))

    def rope(self, device):
        """The RoPE table (1 + T, D/2, 2). Made anew where it is needed: a buffer would turn bf16 with the weights."""
        return rope_table(*self.grid, self.dim // self.n_head, device=device)

    def forward(self, labels, indices, drop=None, hidden_layer=None):
        """Logits of every index given the class and the indices before it.

        labels  (B,) int64 in [0, num_classes], num_classes meaning "no class"
        indices (B, T) int64, one integer per token in reading order, or (B, T, G), its digits. All T of them: the shift
                by one happens inside
        drop    (B,) bool, which labels to replace by "no class". None: in training mode drawn from torch's global
                generator with probability class_dropout, in eval mode no label
        hidden_layer  a layer number 1..n_layer, or a sequence of them

        Returns logits (B, T, V), or a list with one per digit if tokens have several; with hidden_layer, the pair of
        that and the hidden state (B, T, C) after the layer (a list of states for a sequence). Position i of both has
        seen the class and the indices before i, and is about to predict index i.
        Raises ValueError for shapes that do not fit. Values are not checked: that would stall a GPU at each step.
        """
        (h, w), G = self.grid, len(self.vocab_sizes)
        T, wanted = h * w, [hidden_layer] if isinstance(hidden_layer, int) else list(hidden_layer or [])
        if tuple(indices.shape) not in ((len(labels), T), (len(labels), T, G)) or labels.dim() != 1:
            raise ValueError(f"grid {self.grid} wants labels (B,) and indices (B, {T}) or (B, {T}, {G}), "
                             f"got {tuple(labels.shape)} and {tuple(indices.shape)}")
        if any(not 1 <= number <= len(self.layers) for number in wanted):
            raise ValueError(f"hidden_layer {hidden_layer} is not in 1..{len(self.layers)}")
        digits = split_index(indices, self.vocab_sizes) if indices.dim() == 2 else indices                 # (B, T, G)
        if drop is None and self.training:
            drop = torch.rand(labels.shape, device=labels.device) < self.class_dropout                     # (B,)
        x = torch.cat((self.cls_embedding(labels, drop), self.embed(digits[:, :-1])), 1)                   # (B, T, C)
        x, rope, hidden = self.tok_dropout(x), self.rope(x.device), {}
        for number, layer in enumerate(self.layers, 1):
            x = self._run(layer, x, rope[:T])                                                              # (B, T, C)
            if number in wanted:
                hidden[number] = x
        logits, states = self._predict(x, digits, rope[:G]), [hidden[number] for number in wanted]
        if hidden_layer is None:
            return logits
        return logits, states[0] if isinstance(hidden_layer, int) else states

    def _predict(self, x, digits, rope):
        """x (B, T, C) -> logits. With several digits a small causal transformer runs inside each token, over the G
        places [x, embedding of digit 0, ..., of digit G-2], and place g predicts digit g. Plain LlamaGen is the case
        G = 1 without blocks. The G places are an axis of their own, not folded into the batch: B*T rows are more
        than the 65,535 that fused attention kernels allow, and they would be mostly padding at this length."""
        places = [x] + [table(digits[..., g]) for g, table in enumerate(self.tables[:-1])]                 # G of (B, T, C)
        x = torch.stack(places, 2)                                                                         # (B, T, G, C)
        for block in self.factorized_blocks:
            x = self._run(block, x, rope)                                                                  # (B, T, G, C)
        x = self.norm(x)                                                                                   # (B, T, G, C)
        logits = [output(x[:, :, g]) for g, output in enumerate(self.outputs)]                             # G of (B, T, V)
        return logits if len(logits) > 1 else logits[0]

    def _run(self, block, x, rope):
        if self.grad_checkpoint and self.training:
            return checkpoint(block, x, rope, use_reentrant=False)
        return block(x, rope)

    def flops_per_image(self):
        """Training FLOPs of one image = 3 * forward (backward is two more); forward = 2 FLOPs per multiply-add in

            linear layers   T * weights of `layers` + T*G * weights of `factorized_blocks` + T * weights of `output`
            attention       n_layer * 2*T*T*C + head_layers * T * 2*G*G*C      (q k^T, and the weighted sum of v)

        Matrix products only: no embeddings, norms, activations or softmax, and no recomputation by grad_checkpoint.
        Attention counts as the full square although half of it is masked, as is customary.
        """
        T, G, C = math.prod(self.grid), len(self.vocab_sizes), self.dim
        weights = lambda module: sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
        linear = T * weights(self.layers) + T * G * weights(self.factorized_blocks) + T * weights(self.output)
        attention = 2 * C * (len(self.layers) * T * T + len(self.factorized_blocks) * T * G * G)
        return 3 * 2 * (linear + attention)


def cross_entropy(logits, indices):
    """Mean over images and tokens of -log p(index), a scalar in fp32 and in nats; divided by log 2, bits per token.

    logits and indices as in LlamaGen.forward. Each digit of a token is predicted given those before it, so their
    cross-entropies add up to that of the token.
    """
    logits = [logits] if isinstance(logits, torch.Tensor) else logits
    digits = split_index(indices, [part.shape[-1] for part in logits]) if indices.dim() == 2 else indices  # (B, T, G)
    return sum(F.cross_entropy(part.flatten(0, 1).float(), digits[..., g].flatten()) for g, part in enumerate(logits))


def released_arguments(state_dict, n_head=None):
    """Constructor arguments that the state dict of a public checkpoint implies: all but grid, which leaves no trace in it.

    n_head leaves none either: it is looked up in SIZES by depth and width; ValueError if it is not there and not given.
    Keys `projectors.*` of [2] belong to representation alignment: take them out before loading.
    """
    count = lambda prefix: len({key.split(".")[1] for key in state_dict if key.startswith(prefix)})
    n_layer, dim = count("layers."), len(state_dict["norm.weight"])
    n_head = n_head or {(layers, width): heads for layers, heads, width in SIZES.values()}.get((n_layer, dim))
    if n_head is None:
        raise ValueError(f"no size in SIZES has {n_layer} layers of width {dim}: give n_head")
    return dict(vocab_sizes=[len(weight) for key, weight in state_dict.items() if key.startswith("output.")],
                num_classes=len(state_dict["cls_embedding.embedding_table.weight"]) - 1,
                n_layer=n_layer, n_head=n_head, dim=dim, head_layers=count("factorized_blocks."))


# ---- Sampling ----

def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (B, V) with all but the likeliest tokens at -inf; the argument is left alone.

    First the top_k largest (0 = all), then, of what is left, the smallest set whose probability passes top_p. Tokens
    that tie with the last one kept are kept as well, so the result does not depend on the order of a sort.
    """
    if top_k > 0:
        ranked = logits.topk(min(top_k, logits.shape[-1])).values                                          # (B, k)
        logits = logits.masked_fill(logits < ranked[:, -1:], -torch.inf)
    if top_p < 1:
        ranked = ranked if top_k > 0 else logits.sort(descending=True).values                              # (B, k or V)
        probs = (ranked - logits.logsumexp(-1, keepdim=True)).exp()
        keep = probs.cumsum(-1) - probs <= top_p  # the likelier ones alone do not pass top_p yet
        last = ranked.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)                                 # (B, 1)
        logits = logits.masked_fill(logits < last, -torch.inf)
    return logits


def draw(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row by inverse CDF: logits (B, V), uniforms (B,) in [0, 1) -> (B,) int64. Temperature 0 is argmax."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    probs = filter_logits(logits / temperature, top_k, top_p).softmax(-1)                                  # (B, V)
    # The product with 0 or 1 keeps tokens of probability 0 out even where a parallel cumsum is not quite monotone.
    cdf = probs.cumsum(-1) * (probs > 0)                                                                   # (B, V)
    return (cdf > uniforms[:, None] * cdf.amax(-1, keepdim=True)).byte().argmax(-1)                        # (B,), the first


@contextlib.contextmanager
def packed_weights(model):
    """Within it a model in fp32 on a CPU multiplies by copies of its large matrices that lie as oneDNN reads them best.

    With the few rows of a sampling step a product takes as long as reading the matrix does. LlamaGen-B on two cores, tokens/s
    with and without: batch 1 36 and 30, batch 8 210 and 133, guided 177 and 107. No effect elsewhere.
    """
    large = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer.weight.numel() >= 2**18
             and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and layer.bias is None]
    if torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
        large = []
    for layer in large:
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        layer.forward = lambda x, weight=weight: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    try:
        yield
    finally:
        for layer in large:
            del layer.forward  # uncovers the class's own


@torch.no_grad()
def sample(model, labels, uniforms, cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the indices of B images, token by token and, inside a token, digit by digit.

    labels    (B,) int64 in [0, num_classes]
    uniforms  (B, T, G) in [0, 1): all the randomness there is. An image is a function of its label and its own row, so
              seeding the rows by global sample index makes it independent of batch size and ranks (up to rounding)
    cfg_scale     logits = null + cfg_scale * (cond - null), null being the model told "no class"; 1 = no guidance
    cfg_interval  k >= 0 guides tokens 0 ... k+1 only (k+2 of them, as the public code counts); -1 guides all
    temperature   divides the logits; 0 takes the likeliest digit. top_k, top_p: see filter_logits
    The defaults are the paper's. Returns indices (B, T) int64; split_index gives their digits.
    Raises ValueError for a model in training mode or with non-finite logits, bad shapes, and settings out of range.
    """
    B, T, G = len(labels), math.prod(model.grid), len(model.vocab_sizes)
    if model.training:
        raise ValueError("the model is in training mode, dropout would disturb the samples: call model.eval() first")
    if labels.dim() != 1 or tuple(uniforms.shape) != (B, T, G):
        raise ValueError(f"want labels (B,), uniforms (B, {T}, {G}); got {tuple(labels.shape)}, {tuple(uniforms.shape)}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"want temperature >= 0, top_k >= 0, 0 < top_p <= 1, got {temperature}, {top_k}, {top_p}")
    uniforms = uniforms.to(labels.device, torch.float32).clamp(max=1 - 2**-24)  # rounding to fp32 may have made a 1
    rope, tables, outputs = model.rope(labels.device), model.tables, model.outputs
    caches = [KVCache(T) for _ in model.layers]
    digits = labels.new_empty(B, T, G)
    copies = 1 if cfg_scale == 1 else 2  # guided: one call with rows [all cond; all null]
    labels = torch.cat((labels, torch.full_like(labels, model.num_classes)))[: copies * B]                 # (B or 2B,)
    x = model.cls_embedding(labels)                                                                        # (B or 2B, 1, C)
    with packed_weights(model):
        for t in range(T):
            if copies == 2 and 0 <= cfg_interval < t - 1:  # the interval is over: go on without the null rows
                copies, x = 1, x[:B]
                for cache in caches:
                    cache.keep_rows(B)
            for layer, cache in zip(model.layers, caches):
                x = layer(x, rope[t : t + 1], cache)                                                       # (B or 2B, 1, C)
            head_caches = [KVCache(G) for _ in model.factorized_blocks]
            for g in range(G):
                for block, cache in zip(model.factorized_blocks, head_caches):
                    x = block(x, rope[g : g + 1], cache)                                                   # (B or 2B, 1, C)
                logits = outputs[g](model.norm(x[:, 0])).float()                                           # (B or 2B, V)
                if copies == 2:
                    logits = logits[B:] + cfg_scale * (logits[:B] - logits[B:])                            # (B, V)
                digits[:, t, g] = draw(logits, uniforms[:, t, g], temperature, top_k, top_p)
                x = tables[g](digits[:, t, g, None]).repeat(copies, 1, 1)                                  # (B or 2B, 1, C)
            x = model.embed(digits[:, t, None]).repeat(copies, 1, 1)                                       # (B or 2B, 1, C)
    if not logits.isfinite().all():  # nan compares as false all along: draw() would have made a picture of zeros
        raise ValueError("the logits are not finite: these weights, or their dtype, cannot be sampled from")
    return join_index(digits, model.vocab_sizes)
