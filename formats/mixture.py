"""Sources with a share of what training sees: which frame stands where in the endless stream of its samples.

A source that has a share is a group; all the others are one together, with what is left. Each group comes in
permutations of its own, one per epoch of its own, and has its share of every stretch of the stream, to an image or two.
"""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np

from scene.frames import UserError


def gather_groups(shares, ends):
    """[(share, ranges of indices)] of sources with shares, 0 for none, whose indices end there. Raises UserError."""
    exact = [Fraction(share).limit_denominator(10**9) for share in shares]  # .1, .2 and .7 sum to 1
    spans = [range(start, end) for start, end in itertools.pairwise([0, *ends])]
    groups = [(share, [span]) for share, span in zip(exact, spans, strict=True) if share]
    others = [span for share, span in zip(exact, spans, strict=True) if not share]
    total = sum(exact)
    if total > 1 or (total == 1) == bool(others):
        wanted = "less than 1, as others have none" if others else "1"
        raise UserError(f"the shares of data.train sum to {float(total):g}, expected {wanted}")
    if others:
        groups.append((1 - total, others))
    for share, own in groups:
        if not any(own):
            raise UserError(f"a share of {float(share):g} of data.train falls to sources without frames")
    return groups


class Mixture:
    """(epoch, index) at each position of the stream, a function of (seed, position); arguments as `gather_groups`.

    The epoch, with which the augmentation varies, counts the turns of the index's own group.
    """

    def __init__(self, shares, ends, seed):
        self.groups = []
        for share, spans in gather_groups(shares, ends):
            self.groups.append((share, sum(map(len, spans)), tuple(spans)))
        self.seed = seed

    def __call__(self, position):
        """Each group takes its places from the positions that those before leave, evenly."""
        left = Fraction(1)
        for share, count, spans in self.groups:
            before = math.floor(position * share / left)
            if math.floor((position + 1) * share / left) > before:
                epoch, place = divmod(before, count)
                return epoch, int(permute(spans, self.seed, epoch)[place])
            position -= before
            left -= share
        raise AssertionError(f"the shares {[group[0] for group in self.groups]} do not sum to 1")


@functools.lru_cache(16)  # a batch may span two epochs of each group
def permute(spans, seed, epoch):
    """The indices of some ranges in the order of an epoch, which is another one in each group."""
    indices = np.concatenate([np.arange(span.start, span.stop) for span in spans])
    return np.random.default_rng((seed, epoch, spans[0].start)).permutation(indices)
