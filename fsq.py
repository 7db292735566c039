"""Finite scalar quantization (FSQ) and iFSQ: continuous latents in, grid codes and integer tokens out.

    image -> Encoder -> z --[ this file ]--> z_q in [-1, 1] (for diffusion)  and  one integer per vector (for an AR model)

FSQ (Mentzer et al. 2023, arXiv 2309.15505) needs no codebook: squash every latent channel into (-1, 1), then round it to
one of L values. iFSQ (arXiv 2601.17124, Algorithm 1) changes one number in it:

    y   = 2 * sigmoid(alpha * z) - 1     alpha = 2.0: FSQ, since 2*sigmoid(2z) - 1 = tanh(z);  alpha = 1.6: iFSQ
    q   = round(y * h),  h = (L - 1)/2   straight-through: the gradient passes as if round were the identity
    z_q = q / h                          on the grid {-1, ..., 1}
    index = sum_i (q_i + h_i) * basis_i  basis = [1, L_1, L_1*L_2, ...]: the first channel is the least significant digit

Why 1.6: encoder outputs are close to N(0, 1), and the sigmoid that best imitates the Gaussian CDF makes y nearly uniform,
so no code value is starved. tanh is too steep: it crowds the values near the two ends.

What the paper does not say, and `edges` is for. Rounding y*h leaves the two outermost bins half as wide as the others. So
with uniform y the *values* are spread evenly, but the *indices* are not: for z ~ N(0, 1) and L = 9 their entropy is 0.972 of
log2(L) with alpha = 1.6 and 0.993 with tanh, whose crowding happens to fill the half bins. `edges="full"` cuts [-1, 1] into L
bins of equal width with the codes at their centres (h = L/2 instead of (L-1)/2, and the grid ends at 1 - 1/L): entropy 0.9987,
and a quarter less squared error in y at L = 9, 41% less at L = 5, 60% less at L = 3. That is arithmetic about a Gaussian, not a
promise about a trained tokenizer; the default is the paper's "half". `python fsq.py` computes all these numbers.

This file needs torch alone: copy it.

    import torch
    from fsq import FSQ
    fsq = FSQ([17, 17, 17, 17])                 # iFSQ at 4 bits a channel; alpha=2.0 is FSQ
    z = torch.randn(2, 16, 16, 4)               # channels last
    z_q, indices = fsq(z)                       # (2, 16, 16, 4) in [-1, 1], (2, 16, 16) int64 in [0, 83521)
    assert torch.equal(fsq.indices_to_codes(indices), z_q)
"""
import math

import torch
from torch import nn

EDGES = ("half", "full", "original")


def bound(z, alpha=1.6):
    """The paper's one line: squash z (any shape, any reals) into y in [-1, 1], in fp32.

    alpha is a number (1.6 iFSQ, 2.0 FSQ = tanh, 1.702 nearest to the Gaussian CDF in the largest gap) or "erf", the
    Gaussian CDF itself: y = 2*Phi(z) - 1, exactly uniform for z ~ N(0, 1).
    """
    z = z.float()  # bf16 has 8 bits of mantissa: rounding z to it would move 10% of the indices at 17 levels
    return torch.erf(z / math.sqrt(2)) if alpha == "erf" else 2 * torch.sigmoid(alpha * z) - 1


def grid(levels, edges="half"):
    """How `levels` ((d,) or () int64) are laid out: (scale, offset, centre, unit), each of the same shape.

    y is rounded as q = round(y*scale - offset), an integer in [-(L//2), (L-1)//2]; its digit is q + L//2 and its code value
    (q + centre) / unit. An even L has no level in the middle, so its integers sit half a step off y*scale.
      half      scale = unit = (L-1)/2: the paper; codes 2k/(L-1) - 1; the two outer bins are half as wide
      full      scale = unit = L/2: L bins of equal width; codes (2k+1)/L - 1, the bin centres
      original  Mentzer et al.: y stretched by 0.1% so that the end levels are reached; codes q / (L//2), which for even L
                run from -1 to 1 - 2/L only
    """
    offset = (levels % 2 == 0) * 0.5
    if edges == "original":
        return (levels - 1) * 1.001 / 2, offset, torch.zeros_like(offset), levels // 2
    width = (levels - 1 if edges == "half" else levels) / 2
    return width, offset, offset, width


def quantize(z, levels, alpha=1.6, edges="half"):
    """Algorithm 1: z (..., d) -> codes z_q (..., d) fp32 in [-1, 1] and digits (..., d) int64 in [0, L).

    levels: (d,) int64 tensor or list, each >= 2, or one int for all channels. The forward value is exactly on the grid; the
    gradient is that of the unrounded y. edges="original" with alpha=2.0 (their tanh) is the FSQ of Mentzer et al. and of the
    projects that copied it.
    """
    levels = torch.as_tensor(levels, device=z.device)
    scale, offset, centre, unit = grid(levels, edges)
    if edges == "original":
        z = z.float() + torch.atanh(offset / scale)  # so that z = 0 stays at code 0 for even L; 0 for odd L
    y = bound(z, alpha)
    # in place from here on: what takes the time is memory that is new
    q = (y.detach() * scale).sub_(offset).round_()
    if edges != "half":  # whose ends are out of reach; y = 1 would round up into a bin L that "full" does not have
        q.clamp_(min=-(levels // 2), max=(levels - 1) // 2)
    digits = q.long().add_(levels // 2)
    if edges == "original":
        y = y * (scale / unit)  # 1 for the others
    return StraightThrough.apply(y, q.add_(centre).div_(unit)), digits


class StraightThrough(torch.autograd.Function):
    """(y, z_q) -> z_q, with the gradient of y: rounding has none of its own."""

    @staticmethod
    def forward(ctx, y, z_q):
        return z_q.view_as(z_q)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class FSQ(nn.Module):
    """Finite scalar quantizer without parameters or buffers in the state dict.

    levels: number of code values per channel, any mix of odd and even integers >= 2; d = len(levels)
    alpha:  1.6 = iFSQ, 2.0 = FSQ (tanh), or "erf"; see `bound`
    edges:  "half" (the paper), "full" (equal bins) or "original" (Mentzer et al.); see `grid`
    Raises ValueError for levels below 2, an unknown `edges`, a last dimension other than d, indices or codes outside the
    grid, and for indices when the product of the levels exceeds int64 (`fsq(z, return_indices=False)` still works then).
    """

    def __init__(self, levels, alpha=1.6, edges="half"):
        super().__init__()
        if not levels or any(int(level) != level or level < 2 for level in levels):
            raise ValueError(f"levels must be integers of at least 2, not {list(levels)}")
        if edges not in EDGES:
            raise ValueError(f"edges must be one of {', '.join(EDGES)}, not {edges!r}")
        if alpha != "erf" and not (isinstance(alpha, (int, float)) and 0 < alpha < math.inf):
            raise ValueError(f'alpha must be a positive number or "erf", not {alpha!r}')
        self.alpha, self.edges = alpha, edges
        self.uniform = len(set(levels)) == 1
        self.codebook_size = math.prod(int(level) for level in levels)  # a Python integer: it may exceed int64
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # integer buffers survive .half() unrounded; non-persistent, so that a state dict stays free of them
        self.register_buffer("levels", torch.tensor(list(levels), dtype=torch.int64), persistent=False)
        self.register_buffer("basis", torch.tensor([b if b < 2**63 else 0 for b in basis], dtype=torch.int64), persistent=False)

    def forward(self, z, return_indices=True):
        """z (..., d), any float dtype -> z_q (..., d) in [-1, 1] of the same dtype, indices (...) int64 or None."""
        self._check_last_dim(z)
        if z.device.type == "cpu" and z.numel() > 2**21:  # parts that reuse their memory: a third of the time
            parts = z.flatten(0, -2).split(2**19 // len(self.levels) + 1)
            z_q, indices = zip(*(self(part, return_indices) for part in parts))
            return torch.cat(z_q).view(z.shape), torch.cat(indices).view(z.shape[:-1]) if return_indices else None
        levels = self.levels[0] if self.uniform else self.levels  # on a CPU one number is 3 times as fast as one a channel
        z_q, digits = quantize(z, levels, self.alpha, self.edges)
        return z_q.to(z.dtype), self.digits_to_indices(digits) if return_indices else None

    def digits_to_indices(self, digits):
        """(..., d) int64, digit i in [0, L_i) -> (...) int64: mixed radix, the first channel least significant."""
        self._check_fits()
        index = digits[..., -1]  # integers: floats lose whole codes from L = 27 on, and past 2^24
        for i in reversed(range(len(self.levels) - 1)):
            index = index * self.levels[i] + digits[..., i]
        return index

    def indices_to_digits(self, indices):
        """(...) int64 in [0, codebook_size) -> (..., d) int64: the inverse of `digits_to_indices`."""
        self._check_fits()
        if indices.numel() and not (indices.min() >= 0 and indices.max() < self.codebook_size):
            raise ValueError(f"indices must be in [0, {self.codebook_size}), got [{indices.min()}, {indices.max()}]")
        return indices.long().unsqueeze(-1) // self.basis % self.levels

    def codes_to_indices(self, codes):
        """Grid codes (..., d) -> (...) int64; values a little off the grid go to the nearest code."""
        self._check_last_dim(codes)
        _, _, centre, unit = grid(self.levels, self.edges)
        digits = torch.round(codes.float() * unit - centre).long() + self.levels // 2
        if not ((digits >= 0) & (digits < self.levels)).all():
            raise ValueError("codes lie outside the grid of these levels: quantize them first")
        return self.digits_to_indices(digits)

    def indices_to_codes(self, indices):
        """(...) int64 -> (..., d) fp32 codes: the inverse of `codes_to_indices`, by arithmetic, without a table."""
        _, _, centre, unit = grid(self.levels, self.edges)
        return (self.indices_to_digits(indices) - self.levels // 2 + centre) / unit

    def extra_repr(self):
        return f"levels={self.levels.tolist()}, alpha={self.alpha}, edges={self.edges!r}"

    def _check_last_dim(self, z):
        if z.shape[-1:] != self.levels.shape:
            raise ValueError(f"the last dimension must be {len(self.levels)} (one per level), got shape {tuple(z.shape)}")

    def _check_fits(self):
        if self.codebook_size >= 2**63:
            raise ValueError(f"the product of levels {self.levels.tolist()} does not fit in int64: take fewer or smaller "
                             "levels, or quantize with return_indices=False")


class CodeUsage:
    """How a whole data set uses the codes: an exact histogram of indices, sparse, so that it works for any codebook.

    Measure it over a data set, never per batch: a batch of 1,000 tokens cannot use 83,521 codes.

        usage = CodeUsage([17, 17, 17, 17])
        for ...: usage.update(indices)          # any shape, int64
        usage.all_reduce()                      # under torch.distributed: the sum over all ranks
        usage.report()["entropy_bits"]
    """

    def __init__(self, levels):
        self.fsq = FSQ(levels)
        self.values = torch.zeros(0, dtype=torch.int64)  # the codes seen so far, and
        self.counts = torch.zeros(0, dtype=torch.int64)  # how often

    def update(self, indices):
        """Count indices (any shape, int64, in range)."""
        values, counts = torch.unique(indices.detach().cpu(), return_counts=True)
        self._add([self.values, values], [self.counts, counts])

    def all_reduce(self):
        """Sum the histograms of all ranks of the default process group; afterwards every rank holds the sum."""
        shares = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (self.values, self.counts))
        self._add([values for values, _ in shares], [counts for _, counts in shares])

    def report(self):
        """Use (share of codes that occur), entropy (bits) and perplexity (2^entropy), joint and of each channel."""
        joint = _spread(self.counts, self.fsq.codebook_size)
        digits = self.fsq.indices_to_digits(self.values)
        channels = []
        for i, level in enumerate(self.fsq.levels.tolist()):
            histogram = torch.zeros(level, dtype=torch.int64).index_add_(0, digits[:, i], self.counts)
            channels.append({**_spread(histogram, level), "histogram": histogram.tolist()})
        return {"tokens": int(self.counts.sum()), "codes_used": len(self.values), "codebook_size": self.fsq.codebook_size,
                **joint, "bits_per_token": math.log2(self.fsq.codebook_size), "channels": channels}

    def _add(self, values, counts):
        self.values, inverse = torch.unique(torch.cat(values), return_inverse=True)
        self.counts = torch.zeros_like(self.values).index_add_(0, inverse, torch.cat(counts))


def _spread(counts, size):
    p = counts[counts > 0].double()
    p = p / p.sum()
    entropy = -(p * p.log2()).sum().item() + 0.0  # + 0.0 turns the -0.0 of a single code into 0.0
    return {"use": len(p) / size, "entropy_bits": entropy, "perplexity": 2**entropy}


def analyse(level, alpha, edges, n=1 << 19):
    """One channel fed with z ~ N(0, 1): what `python fsq.py` prints as a row.

    The n samples are the Gaussian's quantiles at (i + 0.5)/n, so that the figures are exact to about 1/n and repeat.
    Returns ks (largest gap between the CDF of y and the uniform one), entropy (of the indices, as a share of log2 L),
    least and most (probability of the rarest and commonest index, times L), mse (mean of (y - z_q)^2).
    """
    z = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    y = bound(z, alpha).double()
    ks = ((y + 1) / 2 - (torch.arange(n) + 0.5) / n).abs().max()
    z_q, digits = quantize(z[:, None], [level], alpha, edges)
    p = torch.bincount(digits[:, 0], minlength=level).double() / n
    entropy = -(p[p > 0] * p[p > 0].log2()).sum() / math.log2(level)
    return {"ks": ks.item(), "entropy": entropy.item(), "least": p.min().item() * level, "most": p.max().item() * level,
            "mse": (y - z_q[:, 0]).square().mean().item()}


def main():
    print("z ~ N(0,1). ks: largest gap of the CDF of y to the uniform one. entropy: of the indices, share of log2(L).\n"
          "least, most: probability of the rarest and the commonest index times L (1 = fair). mse: mean (y - z_q)^2.\n")
    print(f"{'L':>3} {'edges':<6} {'alpha':<12} {'ks':>7} {'entropy':>8} {'least':>6} {'most':>6} {'mse':>9}")
    names = {2.0: "2.0 (tanh)", 1.6: "1.6 (iFSQ)", 1.702: "1.702", "erf": "erf"}
    for level in (3, 5, 9, 17, 33):
        for edges in ("half", "full"):
            for alpha, name in names.items():
                row = analyse(level, alpha, edges)
                print(f"{level:3d} {edges:<6} {name:<12} {row['ks']:7.4f} {row['entropy']:8.4f} "
                      f"{row['least']:6.3f} {row['most']:6.3f} {row['mse']:9.2e}")


if __name__ == "__main__":
    main()
