"""LlamaGen: a Llama that generates an image as a sequence of token indices, in reading order.

    image -> Tokenizer.encode -> h x w indices --[ this file ]--> new indices
    new indices -> Tokenizer.decode_indices -> image

The model learns p(indices | class), the product over i of p(index_i | class, indices before i),
with cross-entropy. It is sampled token by token. This file needs only torch. As in dit.py, the
caller draws the dropped labels and the random numbers for sampling, and passes them in.

Sources
  [1] Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation",
      arXiv 2406.06525; github.com/FoundationVision/LlamaGen: the network and its parameter names
  [2] iFSQ, arXiv 2601.17124; github.com/Tencent-Hunyuan/iFSQ: multi-index tokens, factorised head

Multi-index tokens. Four iFSQ channels of 17 levels make 17^4 = 83,521 indices. That is too many for
one softmax: its two tables would outweigh a small network, and most indices are too rare to learn.
But an index is a number in base 17, so it can be split into two digits in base 17^2 = 289, one for
channels 0 and 1 and one for channels 2 and 3. A token then enters as the sum of two embeddings and
is predicted by two softmaxes over 289, the second of which is given the first digit. (In fsq.py a
digit is one channel. Here a digit is a group of channels.)

Shape letters: B batch, T = h*w tokens, C width, N heads, D = C/N width of a head, G digits of a
token (1 unless multi-index), V values of a digit.

Usage
    import torch
    from llamagen import SIZES, LlamaGen, cross_entropy, sample
    depth, width, heads = SIZES["nano"]
    model = LlamaGen(grid=(4, 4), vocab_sizes=[25, 25], num_classes=10,
                     n_layer=depth, n_head=heads, dim=width)
    labels, indices = torch.randint(10, (8,)), torch.randint(625, (8, 16))
    logits = model(labels, indices, drop=torch.rand(8) < 0.1)
    cross_entropy(logits, indices).backward()
    new = sample(model.eval(), labels, torch.rand(8, 16, 2))        # (8, 16), each in [0, 625)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

SIZES = {  # name: (depth, width, heads), as in [1] and [2]; nano is ours, for a laptop
    "nano": (12, 96, 4),
    "S": (12, 384, 12),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (36, 1280, 20),
    "XXL": (48, 1536, 24),
    "3B": (24, 3200, 32),
}


# ---- One index as several digits ----

def group_vocab(levels, groups):
    """Values of each of `groups` digits: [17, 17, 17, 17], 2 -> [289, 289].

    levels  the number of levels of each channel, least significant first
    Raises ValueError if the channels cannot be divided into groups of equal size.
    """
    if groups < 1 or len(levels) % groups:
        raise ValueError(f"{len(levels)} channels cannot be cut into {groups} groups: give a "
                         f"divisor of {len(levels)}")
    size = len(levels) // groups
    return [math.prod(levels[i : i + size]) for i in range(0, len(levels), size)]


def split_index(indices, vocab_sizes):
    """Indices (...) int64 -> digits (..., G) int64, digit g in [0, vocab_sizes[g]), lowest first.

    An index out of range gives a last digit out of range, on which the embedding fails.
    Raises ValueError for another dtype.
    """
    if indices.dtype != torch.int64:
        raise ValueError(f"indices are {indices.dtype}, but digits need int64: pass indices.long()")
    digits = []
    for size in vocab_sizes[:-1]:
        digits.append(indices % size)
        indices = indices // size
    return torch.stack([*digits, indices], dim=-1)


def join_index(digits, vocab_sizes):
    """The inverse of split_index: digits (..., G) int64 -> indices (...) int64.

    Raises ValueError if the last axis is not G = len(vocab_sizes) or the dtype is not int64.
    """
    if digits.shape[-1] != len(vocab_sizes) or digits.dtype != torch.int64:
        raise ValueError(f"want int64 digits (..., {len(vocab_sizes)}), got {digits.dtype} "
                         f"{tuple(digits.shape)}")
    index = digits[..., -1]
    for g in reversed(range(len(vocab_sizes) - 1)):
        index = index * vocab_sizes[g] + digits[..., g]
    return index


# ---- Positions: 2D rotary embedding ----

def rope_table(h, w, head_dim, base=10000.0, device=None):
    """cos and sin of every rotation: (1 + h*w, D/2, 2) fp32.

    Row 0 is the class token, row 1 + y*w + x the position (y, x). The first half of the D/2 channel
    pairs turns with y, the second with x. The class row is all zeros instead of cos = 1, which sets
    q and k of the class token to 0: the released weights were trained like this ([1],
    precompute_freqs_cis_2d).
    """
    quarter = head_dim // 4
    exponents = torch.arange(quarter, device=device, dtype=torch.float32) / quarter
    speed = base**-exponents                                   # (D/4,)
    y = torch.arange(h, device=device).repeat_interleave(w)    # (T,)
    x = torch.arange(w, device=device).repeat(h)               # (T,)
    angle = torch.cat([y[:, None] * speed, x[:, None] * speed], dim=1)        # (T, D/2)
    table = torch.stack([angle.cos(), angle.sin()], dim=-1)    # (T, D/2, 2)
    return F.pad(table, (0, 0, 0, 0, 1, 0))                    # (1 + T, D/2, 2)


def rotate(x, rope):
    """Turn the channel pairs (0,1), (2,3), ... of x (..., T, D) by rope (T, D/2, 2), in fp32."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)                 # (..., T, D/2) each
    cos, sin = rope.unbind(-1)                                 # (T, D/2) each
    turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return turned.flatten(-2).type_as(x)                       # (..., T, D)


# ---- The network ----

class KVCache:
    """The keys and values of one layer for the positions sampled so far, at most `length`."""

    def __init__(self, length):
        self.length, self.used = length, 0

    def append(self, k, v):
        """k, v (B, N, 1, D) of the next position -> those of all positions so far."""
        if self.used == 0:  # batch, dtype (autocast) and device are known only here
            B, N, _, D = k.shape
            self.k = k.new_empty(B, N, self.length, D)
            self.v = v.new_empty(B, N, self.length, D)
        self.k[:, :, self.used] = k[:, :, 0]
        self.v[:, :, self.used] = v[:, :, 0]
        self.used += 1
        return self.k[:, :, : self.used], self.v[:, :, : self.used]           # (B, N, used, D) each


class Attention(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.n_head = n_head
        self.wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.resid_dropout = nn.Dropout(dropout)

    def forward(self, x, rope, cache=None):
        """Causal attention. With a cache, x is the next position alone and sees all before it."""
        qkv = self.wqkv(x).unflatten(-1, (3 * self.n_head, -1)).transpose(-2, -3)  # (..., 3N, T, D)
        qk, v = qkv.split([2 * self.n_head, self.n_head], dim=-3)
        q, k = rotate(qk, rope).chunk(2, dim=-3)               # (..., N, T, D) each
        if cache is not None:
            k, v = cache.append(k, v)                          # (B, N, used, D) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        out = out.transpose(-2, -3).flatten(-2)                # (..., T, C)
        return self.resid_dropout(self.wo(out))                # (..., T, C)


class FeedForward(nn.Module):
    """SwiGLU with three matrices, 2/3 of 4C wide, rounded up to a multiple of 256 as in [1]."""

    def __init__(self, dim, dropout):
        super().__init__()
        hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.ffn_dropout = nn.Dropout(dropout)

    def forward(self, x):
        hidden = F.silu(self.w1(x)) * self.w3(x)               # (..., T, hidden)
        return self.ffn_dropout(self.w2(hidden))               # (..., T, C)


class Block(nn.Module):
    def __init__(self, dim, n_head, dropout):
        super().__init__()
        self.attention = Attention(dim, n_head, dropout)
        self.feed_forward = FeedForward(dim, dropout)
        self.attention_norm = nn.RMSNorm(dim, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(dim, eps=1e-5)

    def forward(self, x, rope, cache=None):
        x = x + self.attention(self.attention_norm(x), rope, cache)           # (..., T, C)
        return x + self.feed_forward(self.ffn_norm(x))         # (..., T, C)


class LabelEmbedding(nn.Module):
    """A class to a vector: (B,) int64 -> (B, 1, C). The last row means "no label"."""

    def __init__(self, num_classes, dim):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, labels, drop=None):
        if drop is not None:
            labels = labels.masked_fill(drop, self.num_classes)               # (B,)
        return self.embedding_table(labels)[:, None]           # (B, 1, C)


class LlamaGen(nn.Module):
    """Class and indices in, logits of each digit of every token out.

    grid            (h, w) of the tokens, not necessarily equal
    vocab_sizes     values of each digit of a token: [V] is plain LlamaGen, [289, 289] multi-index
    num_classes     1 or more (unconditional: 1); label `num_classes` means "no label"
    n_layer, n_head, dim   the number of layers, N, C: see SIZES
    head_layers     blocks of the factorised head, used only if a token has several digits; 2 in [2]
    dropout         on embeddings, attention output and feed-forward output; 0.1 as in [1]
    grad_checkpoint recompute each block in the backward pass: less memory, one more forward

    Has .dim (C), .grid, .depth, .num_classes, .vocab_sizes.
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, *, grid, vocab_sizes, num_classes, n_layer, n_head, dim, head_layers=2,
                 dropout=0.1, grad_checkpoint=False):
        super().__init__()
        self.grid, self.vocab_sizes = tuple(grid), tuple(vocab_sizes)
        self.num_classes, self.grad_checkpoint = num_classes, grad_checkpoint
        self.depth, self.n_head, self.dim = n_layer, n_head, dim
        self.check_sizes()
        self.cls_embedding = LabelEmbedding(num_classes, dim)
        self.tok_dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Block(dim, n_head, dropout) for _ in range(n_layer))
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.factorized_blocks = nn.ModuleList()
        if len(vocab_sizes) == 1:
            self.tok_embeddings = nn.Embedding(vocab_sizes[0], dim)
            self.output = nn.Linear(dim, vocab_sizes[0], bias=False)
        else:  # the public code has other parameter names then
            self.factorized_blocks.extend(Block(dim, n_head, dropout) for _ in range(head_layers))
            for g, size in enumerate(vocab_sizes):
                self.add_module(f"{g}_emb", nn.Embedding(size, dim))
            self.output = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in vocab_sizes)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for output in self.outputs:
            nn.init.zeros_(output.weight)  # the first prediction is uniform: loss = log V

    def check_sizes(self):
        T, G = math.prod(self.grid), len(self.vocab_sizes)
        if min(*self.grid, self.num_classes) < 1:
            raise ValueError(f"grid {self.grid}, num_classes {self.num_classes}: want 1 or more")
        if G == 0 or min(self.vocab_sizes) < 1 or math.prod(self.vocab_sizes) >= 2**63:
            raise ValueError(f"vocab_sizes {self.vocab_sizes}: want one or several ints >= 1 whose "
                             "product fits an int64")
        if self.dim % (4 * self.n_head):
            raise ValueError(f"dim {self.dim} is not a multiple of 4 * {self.n_head} heads")
        if G > T:  # the head uses the first G rows of the RoPE table
            raise ValueError(f"{G} digits need {G} positions, grid {self.grid} has {T}")

    @property
    def tables(self):
        """The embedding table of each digit."""
        G = len(self.vocab_sizes)
        if G == 1:
            return [self.tok_embeddings]
        return [getattr(self, f"{g}_emb") for g in range(G)]

    @property
    def outputs(self):
        """The output layer of each digit."""
        return [self.output] if len(self.vocab_sizes) == 1 else self.output

    def embed(self, digits):
        """Digits (B, T, G) int64 -> token embeddings (B, T, C), the sum over the digits."""
        return sum(table(digits[..., g]) for g, table in enumerate(self.tables))

    def rope(self, device):
        """The RoPE table (1 + T, D/2, 2) fp32. As a buffer, .bfloat16() would convert it."""
        return rope_table(*self.grid, self.dim // self.n_head, device=device)

    def forward(self, labels, indices, drop=None, hidden_layer=None):
        """Logits of the digits of every token, given the class and the indices before it.

        labels        (B,) int64 in [0, num_classes]
        indices       (B, T) int64 in reading order, or their digits (B, T, G); all T of them:
                      the model shifts them by one itself
        drop          (B,) bool, True where the label is replaced by "no label"; None drops nothing
        hidden_layer  None, a layer k in 1..depth, or a sequence of layers

        Returns logits (B, T, V), or a list of them, one per digit. With hidden_layer k, returns the
        pair (logits, state (B, T, C) after layer k); with a sequence, (logits, list of states). At
        position i, both have seen the class and the indices before i, and the logits of a digit
        have also seen the lower digits of index i.
        Raises ValueError for a wrong shape or layer. Values are not checked: reading them would
        make the host wait for the device.
        """
        T, G = math.prod(self.grid), len(self.vocab_sizes)
        B = len(labels)
        layers = [hidden_layer] if isinstance(hidden_layer, int) else list(hidden_layer or [])
        if labels.ndim != 1 or indices.shape not in ((B, T), (B, T, G)):
            raise ValueError(f"grid {self.grid} wants labels (B,) and indices (B, {T}) or (B, {T}, "
                             f"{G}), got {tuple(labels.shape)} and {tuple(indices.shape)}")
        if any(not 1 <= k <= self.depth for k in layers):
            raise ValueError(f"hidden_layer {layers} is not in 1..{self.depth}")
        digits = split_index(indices, self.vocab_sizes) if indices.ndim == 2 else indices
        rope = self.rope(labels.device)                        # (1 + T, D/2, 2)
        class_token = self.cls_embedding(labels, drop)         # (B, 1, C)
        x = torch.cat([class_token, self.embed(digits[:, :-1])], dim=1)       # (B, T, C)
        x = self.tok_dropout(x)
        states = {}
        for k, layer in enumerate(self.layers, start=1):
            x = self.run(layer, x, rope[:T])                   # (B, T, C)
            if k in layers:
                states[k] = x
        logits = self.predict(x, digits, rope[:G])             # G of (B, T, V)
        if G == 1:
            logits = logits[0]
        if hidden_layer is None:
            return logits
        if isinstance(hidden_layer, int):
            return logits, states[hidden_layer]
        return logits, [states[k] for k in layers]

    def predict(self, x, digits, rope):
        """x (B, T, C) -> the logits of each digit, a list of G times (B, T, V).

        With several digits, a small causal transformer runs over the G places of each token: x,
        then the embeddings of digits 0 to G-2. Place g predicts digit g. With G = 1 there are no
        blocks. The places are an axis of their own: fused attention fails for a batch of B*T rows.
        """
        lower = [table(digits[..., g]) for g, table in enumerate(self.tables[:-1])]  # (B, T, C)
        x = torch.stack([x, *lower], dim=2)                    # (B, T, G, C)
        for block in self.factorized_blocks:
            x = self.run(block, x, rope)                       # (B, T, G, C)
        x = self.norm(x)                                       # (B, T, G, C)
        return [output(x[:, :, g]) for g, output in enumerate(self.outputs)]

    def run(self, block, x, rope):
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, x, rope, use_reentrant=False)
        return block(x, rope)

    def flops_per_image(self):
        """Training FLOPs of one image, an int: 3 x those of a forward pass (a multiply-add is 2).

            linear layers  2 * T * (weights of layers + G * weights of factorized_blocks + output)
            attention      4 * T*T * C * n_layer + 4 * T * G*G * C * head_layers

        Attention counts as the full square, as is customary, although half of it is masked.
        Embeddings, norms, activations, softmax and recomputation are not counted.
        """
        T, G = math.prod(self.grid), len(self.vocab_sizes)
        products = 2 * self.dim * T * (self.depth * T + len(self.factorized_blocks) * G**2)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                times = T * G if name.startswith("factorized_blocks") else T
                products += module.weight.numel() * times
        return 3 * 2 * products


def cross_entropy(logits, indices):
    """Mean over images and tokens of -log p(index), a scalar in fp32, in nats.

    logits and indices as in LlamaGen.forward. The cross-entropies of a token's digits add up to
    that of the token, since each digit is predicted given those before it.
    """
    if isinstance(logits, torch.Tensor):
        logits = [logits]
    digits = indices                                           # (B, T, G)
    if indices.ndim == 2:
        digits = split_index(indices, [digit_logits.shape[-1] for digit_logits in logits])
    return sum(F.cross_entropy(digit_logits.flatten(0, 1).float(), digits[..., g].flatten())
               for g, digit_logits in enumerate(logits))       # of (B*T, V) and (B*T,)


# ---- Sampling ----

def filter_logits(logits, top_k=0, top_p=1.0):
    """Logits (B, V) with all but the most likely tokens at -inf, as a new tensor.

    Keeps the top_k largest (0 = all), and of these the smallest set whose probability exceeds
    top_p, with all tokens that tie with the last one.
    """
    if top_k > 0:
        ranked = logits.topk(min(top_k, logits.shape[-1])).values             # (B, k)
        logits = logits.masked_fill(logits < ranked[:, -1:], -torch.inf)
    if top_p < 1:
        if top_k == 0:
            ranked = logits.sort(descending=True).values       # (B, V)
        probs = (ranked - logits.logsumexp(-1, keepdim=True)).exp()           # (B, k or V)
        keep = probs.cumsum(-1) - probs <= top_p  # the more likely tokens do not exceed top_p yet
        last = ranked.masked_fill(~keep, torch.inf).amin(-1, keepdim=True)    # (B, 1)
        logits = logits.masked_fill(logits < last, -torch.inf)
    return logits


def draw(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row by inverse CDF: logits (B, V), uniforms (B,) in [0, 1) -> (B,) int64.

    A temperature below 1e-6, with which fp32 could overflow, takes the most likely token.
    """
    logits = logits.float()
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = filter_logits(logits / temperature, top_k, top_p)
    probs = logits.softmax(-1)                                 # (B, V)
    # Rounding can make a parallel cumsum decrease. The product rules out tokens of probability 0.
    cdf = probs.cumsum(-1) * (probs > 0)                       # (B, V)
    above = cdf > uniforms[:, None] * cdf.amax(-1, keepdim=True)
    return above.byte().argmax(-1)                             # (B,) the first True


@torch.no_grad()
def sample(model, labels, uniforms, cfg_scale=2.0, cfg_interval=-1, temperature=1.0, top_k=0,
           top_p=1.0):
    """Draw the indices of B images, token by token and, within a token, digit by digit.

    labels        (B,) int64 in [0, num_classes]
    uniforms      (B, T, G) in [0, 1), the only randomness: row b is that of image b
    cfg_scale     logits = null + cfg_scale * (cond - null), null without label; 1 = no guidance
    cfg_interval  k >= 0 guides only tokens 0 to k+1, as the public code counts; -1 guides all
    temperature   divides the logits; 0 takes the most likely digit
    top_k, top_p  see filter_logits

    The defaults are the paper's. Returns indices (B, T) int64.
    Raises ValueError for a model in training mode, non-finite logits, or bad shapes or settings.
    """
    B, T, G = len(labels), math.prod(model.grid), len(model.vocab_sizes)
    if model.training:
        raise ValueError("dropout would disturb the samples: call model.eval() first")
    if labels.ndim != 1 or uniforms.shape != (B, T, G):
        raise ValueError(f"want labels (B,), uniforms (B, {T}, {G}); got {tuple(labels.shape)}, "
                         f"{tuple(uniforms.shape)}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError("want temperature >= 0, top_k >= 0, 0 < top_p <= 1, got "
                         f"{temperature}, {top_k}, {top_p}")
    uniforms = uniforms.to(labels.device, torch.float32)
    uniforms = uniforms.clamp(max=1 - 2**-24)  # rounding to fp32 may give 1
    rope, tables, outputs = model.rope(labels.device), model.tables, model.outputs
    caches = [KVCache(T) for _ in model.layers]
    digits, finite = labels.new_empty(B, T, G), True
    copies = 1
    if cfg_scale != 1:  # one call for both: rows [with label; without label]
        copies = 2
        labels = torch.cat([labels, torch.full_like(labels, model.num_classes)])
    x = model.cls_embedding(labels)                            # (B or 2B, 1, C)
    for t in range(T):
        for layer, cache in zip(model.layers, caches):
            x = layer(x, rope[t : t + 1], cache)               # (B or 2B, 1, C)
        head_caches = [KVCache(G) for _ in model.factorized_blocks]
        token = 0
        for g in range(G):
            for block, cache in zip(model.factorized_blocks, head_caches):
                x = block(x, rope[g : g + 1], cache)           # (B or 2B, 1, C)
            logits = outputs[g](model.norm(x[:, 0])).float()   # (B or 2B, V)
            finite = logits.isfinite().all() & finite
            if copies == 2:
                logits, null = logits.chunk(2)                 # (B, V) each
                if cfg_interval < 0 or t <= cfg_interval + 1:
                    logits = null + cfg_scale * (logits - null)
            digit = draw(logits, uniforms[:, t, g], temperature, top_k, top_p)  # (B,)
            digits[:, t, g] = digit
            x = tables[g](digit).repeat(copies, 1)[:, None]    # (B or 2B, 1, C)
            token = token + x
        x = token  # the model's next input: the sum over the digits
    if not finite:  # draw() turns nan into index 0 without an error
        raise ValueError("the logits are not finite: these weights, or their dtype, cannot be "
                         "sampled from")
    return join_index(digits, model.vocab_sizes)


# ---- Released checkpoints ----

def released_arguments(weights, heads=None):
    """Constructor arguments, except grid, of the LlamaGen whose public state dict is `weights`.

    weights  key -> tensor, of FoundationVision/LlamaGen or Tencent-Hunyuan/iFSQ, without a prefix
    heads    n_head; None: that of the public size in SIZES with this depth and width

    Raises ValueError for another state dict, or if the number of heads is unknown.
    """
    for key in ("cls_embedding.embedding_table.weight", "norm.weight"):
        if key not in weights:
            raise ValueError(f"this is not a class-conditional LlamaGen: it has no {key}")
    vocab_sizes = [len(weights[key]) for key in weights if key.startswith("output.")]
    if not vocab_sizes:
        raise ValueError("this LlamaGen has no output.weight")
    layers = {key.split(".")[1] for key in weights if key.startswith("layers.")}
    head_layers = {key.split(".")[1] for key in weights if key.startswith("factorized_blocks.")}
    depth, dim = len(layers), len(weights["norm.weight"])
    known = {size[:2]: size[2] for name, size in SIZES.items() if name != "nano"}
    heads = heads or known.get((depth, dim))
    if heads is None:
        raise ValueError(f"no known LlamaGen has {depth} layers of width {dim}: give its number of "
                         "attention heads with --heads")
    return {
        "vocab_sizes": vocab_sizes,
        "num_classes": len(weights["cls_embedding.embedding_table.weight"]) - 1,
        "n_layer": depth,
        "n_head": heads,
        "dim": dim,
        "head_layers": len(head_layers),
    }


def released_weights(weights):
    """A public state dict for strict loading: without `projectors.*`, which belong to REPA, and
    without what is computed anew, the tables of RoPE and the caches of a sampler."""
    return {key: w for key, w in weights.items()
            if not key.startswith(("projectors.", "freqs_cis")) and ".kv_cache." not in key}
