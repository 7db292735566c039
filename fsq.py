"""Finite scalar quantization (FSQ) and iFSQ: from continuous latents to grid codes and integers.

    image -> Encoder -> z --[ this file ]--> z_q in [-1, 1] for a diffusion model
                                             and one integer per vector for an AR model

FSQ (Mentzer et al. 2023, arXiv 2309.15505) needs no learned codebook. It squashes every latent
channel into (-1, 1) and rounds it to one of L values. iFSQ (arXiv 2601.17124, Algorithm 1) changes
one number in it, alpha, from 2.0 (for which 2*sigmoid(2z) - 1 = tanh(z)) to 1.6:

    y     = 2 * sigmoid(alpha * z) - 1
    q     = round(y * h), h = (L - 1)/2    the gradient passes as if round were the identity
    z_q   = q / h                          on the grid {-1, ..., 1}
    index = sum_i (q_i + h_i) * basis_i    basis = [1, L_1, L_1*L_2, ...]

These lines hold for odd L. An even L has no level in the middle, so `grid` shifts by half a step.

Why 1.6: the outputs of an encoder are close to N(0, 1), and the CDF of a Gaussian would make y
exactly uniform. The sigmoid with alpha = 2*sqrt(2/pi) = 1.596 has the slope of that CDF at 0, so
y is nearly uniform, while tanh is too steep and crowds y near -1 and 1.

What the paper does not say: rounding y*h leaves the two outermost bins half as wide as the others,
so uniform y does not mean uniform indices. For z ~ N(0, 1) and L = 9 their entropy is 0.972 of
log2(L) with alpha = 1.6 and 0.993 with tanh, whose crowding happens to fill the half bins.
`edges="full"` cuts [-1, 1] into L bins of equal width with the codes at their centres. It reaches
0.9987, with 25% less squared error of y at L = 9, 41% less at L = 5 and 60% less at L = 3. This is
arithmetic about a Gaussian and no promise about a trained tokenizer, so the default is the paper's
"half". `python fsq.py` prints these numbers.

This file needs torch alone: copy it.

    import torch
    from fsq import FSQ
    fsq = FSQ([17, 17, 17, 17])            # iFSQ with 4 bits a channel; alpha=2.0 is FSQ
    z = torch.randn(2, 16, 16, 4)          # channels last
    z_q, indices = fsq(z)                  # (2, 16, 16, 4) in [-1, 1] and (2, 16, 16) in [0, 17^4)
    assert torch.equal(fsq.indices_to_codes(indices), z_q)
"""
import math

import torch
from torch import nn

EDGES = ("half", "full", "original")


def bound(z, alpha=1.6):
    """The paper's one line: z (any shape, any reals) -> y in [-1, 1], fp32.

    alpha is a number or "erf", the Gaussian CDF itself, for which y is exactly uniform if
    z ~ N(0, 1). With alpha = 1.702 the largest gap between the sigmoid and that CDF is smallest.
    """
    z = z.float()  # bf16 has 8 bits of mantissa: it would move 10% of the indices at 17 levels
    if alpha == "erf":
        return torch.erf(z / math.sqrt(2))
    return 2 * torch.sigmoid(alpha * z) - 1


def quantize(z, levels, alpha=1.6, edges="half"):
    """Algorithm 1: z (..., d) -> z_q (..., d) fp32 in [-1, 1] and digits (..., d) int64 in [0, L).

    levels: (d,) int64 tensor or list, or one integer for all channels, each at least 2.
    """
    levels = torch.as_tensor(levels, device=z.device)
    h, shift, centre = grid(levels, edges)
    y = bound_original(z, levels, alpha) if edges == "original" else bound(z, alpha)
    q = torch.round(y.detach() * h - shift)
    if edges != "half":  # where y close to 1 would round up into a bin that does not exist
        q = torch.clamp(q, -(levels // 2), (levels - 1) // 2)
    z_q = (q + centre) / h
    digits = torch.nan_to_num(q, nan=-2**31).long() + levels // 2  # NaN gives a digit < 0
    # Straight-through: exactly z_q in the forward pass, the gradient of y in the backward pass.
    return z_q + (y - y.detach()), digits


def grid(levels, edges="half"):
    """Where the codes lie. levels (d,) or () int64 -> h, shift and centre of the same shape.

    q = round(y*h - shift) is an integer from -(L//2) to (L-1)//2, and its code is (q + centre) / h:
    the shift moves y before it is rounded, and the centre moves the code back. Both are 1/2 for
    even L, which has no level in the middle, and 0 for odd L. Only "original" does not move back.
      half      codes 2k/(L-1) - 1: the paper; the two outermost bins are half as wide
      full      codes (2k+1)/L - 1: the centres of L bins of equal width
      original  codes k/(L//2) - 1: Mentzer et al.; for even L they end at 1 - 2/L
    """
    shift = (levels % 2 == 0).float() / 2
    if edges == "half":
        return (levels - 1).float() / 2, shift, shift
    if edges == "full":
        return levels.float() / 2, shift, shift
    return levels // 2, shift, torch.zeros_like(shift)


def bound_original(z, levels, alpha=2.0):
    """The bound of Mentzer et al. in units of the codes, for edges="original"; alpha=2.0 is theirs.

    y is stretched by 0.1%, and z is moved, so that z = 0 stays at code 0 for even L (exactly so
    only with alpha=2.0). This is how most projects copied it, the public iFSQ code among them: with
    (1 + 0.001) and atanh, where Mentzer et al. have (1 - 0.001) and tan.
    """
    half_l = (levels - 1).float() * 1.001 / 2
    h, shift, _ = grid(levels, "original")
    return bound(z.float() + torch.atanh(shift / half_l), alpha) * (half_l / h)


class FSQ(nn.Module):
    """Finite scalar quantizer. It has no parameters and adds nothing to a state dict.

    levels: number of code values of each channel, odd or even, from 2 to 2^24; d = len(levels)
    alpha:  1.6 is iFSQ, 2.0 FSQ (tanh); or "erf"; see `bound`
    edges:  "half" (the paper), "full" (equal bins) or, with alpha=2.0, "original" (Mentzer et
            al.); see `grid` and `bound_original`
    Raises ValueError for other arguments, for a last dimension other than d, and for codes or (on a
    CPU) indices outside the grid. Calls that need indices also raise it if the product of the
    levels exceeds int64; `fsq(z, return_indices=False)` does not.
    """

    def __init__(self, levels, alpha=1.6, edges="half"):
        super().__init__()
        levels = list(levels)
        if not levels or any(level % 1 or not 2 <= level <= 2**24 for level in levels):
            raise ValueError("levels must be integers of at least 2 and at most 2^24, beyond which "
                             f"fp32 has gaps, not {levels}")
        if edges not in EDGES:
            raise ValueError(f"edges must be one of {', '.join(EDGES)}, not {edges!r}")
        is_slope = isinstance(alpha, (int, float)) and 0 < alpha < math.inf
        if alpha != "erf" and not is_slope:
            raise ValueError(f'alpha must be a positive number or "erf", not {alpha!r}')
        levels = [int(level) for level in levels]
        self.alpha, self.edges = alpha, edges
        self.uniform = len(set(levels)) == 1
        self.codebook_size = math.prod(levels)  # a Python integer, since it may exceed int64
        # Integer buffers survive .half() unrounded. Where the product of the levels overflows,
        # `_check_fits` raises before the basis is used.
        basis = torch.cumprod(torch.tensor([1] + levels[:-1]), 0)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, z, return_indices=True):
        """z (..., d), any float -> z_q (..., d) of the same dtype, indices (...) int64 or None."""
        self._check_last_dim(z)
        if not z.is_floating_point():
            raise ValueError(f"z is of {z.dtype}, not of a float type")
        # On a CPU, one number for all channels is a third faster than a tensor of d numbers.
        levels = self.levels[0] if self.uniform else self.levels
        z_q, digits = quantize(z, levels, self.alpha, self.edges)
        indices = self.digits_to_indices(digits) if return_indices else None
        return z_q.to(z.dtype), indices

    def digits_to_indices(self, digits):
        """digits (..., d) int64, the i-th in [0, L_i) -> indices (...) int64."""
        self._check_fits()
        return (digits * self.basis).sum(-1)  # in integers: fp32 rounds above 2^24

    def indices_to_digits(self, indices):
        """indices (...) int64 in [0, codebook_size) -> digits (..., d) int64."""
        self._check_fits()
        # Training a DiT comes here in every step. On a GPU, reading min and max would stall it.
        if indices.device.type == "cpu" and indices.numel():
            low, high = indices.min(), indices.max()
            if low < 0 or high >= self.codebook_size:
                size = self.codebook_size
                raise ValueError(f"indices must be in [0, {size}), got [{low}, {high}]")
        return indices.long().unsqueeze(-1) // self.basis % self.levels

    def codes_to_indices(self, codes):
        """codes (..., d) -> indices (...) int64; values a little off the grid go to the nearest."""
        self._check_last_dim(codes)
        h, _, centre = grid(self.levels, self.edges)
        digits = torch.round(codes.float() * h - centre).long() + self.levels // 2
        if not ((digits >= 0) & (digits < self.levels)).all():
            raise ValueError("codes lie outside the grid of these levels: quantize them first")
        return self.digits_to_indices(digits)

    def indices_to_codes(self, indices):
        """indices (...) int64 -> codes (..., d) fp32, by arithmetic, without a table."""
        h, _, centre = grid(self.levels, self.edges)
        return (self.indices_to_digits(indices) - self.levels // 2 + centre) / h

    def extra_repr(self):
        return f"levels={self.levels.tolist()}, alpha={self.alpha}, edges={self.edges!r}"

    def _check_last_dim(self, z):
        if z.shape[-1:] != self.levels.shape:
            raise ValueError(f"the last dimension must be {len(self.levels)} (one per level), "
                             f"got shape {tuple(z.shape)}")

    def _check_fits(self):
        if self.codebook_size >= 2**63:
            raise ValueError(f"the product of levels {self.levels.tolist()} does not fit in int64: "
                             "take fewer or smaller levels, or quantize with return_indices=False")


class CodeUsage:
    """How often a data set uses each code: an exact, sparse histogram of its indices.

    Measure it over a data set, never per batch: a batch of 1,000 tokens cannot use 83,521 codes.
    Call `update` for every batch, under torch.distributed `all_reduce` once, then `report`.
    """

    def __init__(self, levels):
        self.fsq = FSQ(levels)
        self.indices = torch.zeros(0, dtype=torch.int64)  # those that have occurred,
        self.counts = torch.zeros(0, dtype=torch.int64)   # and how often

    def update(self, indices):
        """Count indices (any shape) int64, in range."""
        indices, counts = torch.unique(indices.detach().cpu(), return_counts=True)
        self._merge([self.indices, indices], [self.counts, counts])

    def all_reduce(self):
        """Sum the histograms of all ranks: every rank holds the sum afterwards."""
        histograms = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(histograms, (self.indices, self.counts))
        self._merge(*zip(*histograms))

    def report(self):
        """Use (share of codes that occur), entropy (bits), perplexity: joint and per channel."""
        size = self.fsq.codebook_size
        digits = self.fsq.indices_to_digits(self.indices)
        channels = []
        for i, level in enumerate(self.fsq.levels.tolist()):
            histogram = torch.bincount(digits[:, i], self.counts, level).long()
            channels.append({**_spread(histogram, level), "histogram": histogram.tolist()})
        totals = {"tokens": self.counts.sum().item(), "codes_used": len(self.indices)}
        sizes = {"codebook_size": size, "bits_per_token": math.log2(size)}
        return {**totals, **sizes, **_spread(self.counts, size), "channels": channels}

    def _merge(self, indices, counts):
        self.indices, inverse = torch.unique(torch.cat(indices), return_inverse=True)
        self.counts = torch.bincount(inverse, torch.cat(counts)).long()  # exact up to 2^53


def _spread(counts, size):
    p = counts[counts > 0] / counts.sum().double()
    entropy = torch.special.entr(p).sum().item() / math.log(2)
    return {"use": len(p) / size, "entropy_bits": entropy, "perplexity": 2**entropy}


def analyse(level, alpha, edges, n=1 << 19):
    """One channel fed with z ~ N(0, 1): a row of the table that `python fsq.py` prints.

    The samples are the Gaussian's n quantiles at (i + 0.5)/n: the results are exact to about 1/n.
    Returns ks (largest gap between the CDF of y and the uniform one), entropy (of the indices, as
    a share of log2 L), least and most (probability of the rarest and the commonest index, times L),
    and mse (mean of (y - z_q)^2).
    """
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    z = torch.special.ndtri(uniform)
    y = bound(z, alpha).double()
    z_q, digits = quantize(z, level, alpha, edges)
    p = torch.bincount(digits, minlength=level) / n
    return {
        "ks": ((y + 1) / 2 - uniform).abs().max().item(),
        "entropy": _spread(p, level)["entropy_bits"] / math.log2(level),
        "least": p.min().item() * level,
        "most": p.max().item() * level,
        "mse": (y - z_q).square().mean().item(),
    }


def main():
    print("z ~ N(0,1). ks: largest gap of the CDF of y to the uniform one.\n"
          "entropy: of the indices, as a share of log2(L). mse: mean of (y - z_q)^2.\n"
          "least, most: probability of the rarest and the commonest index, times L (1 = fair).\n\n"
          "  L edges  alpha             ks  entropy  least   most       mse")
    names = {2.0: "2.0 (tanh)", 1.6: "1.6 (iFSQ)", 1.702: "1.702", "erf": "erf"}
    for level in (3, 5, 9, 17, 33):
        for edges in ("half", "full"):
            for alpha, name in names.items():
                row = analyse(level, alpha, edges)
                print(f"{level:3d} {edges:<6} {name:<12} {row['ks']:7.4f} {row['entropy']:8.4f} "
                      f"{row['least']:6.3f} {row['most']:6.3f} {row['mse']:9.2e}")


if __name__ == "__main__":
    main()
