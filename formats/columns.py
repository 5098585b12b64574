"""Columns of JSON values, one a row, as arrays; checked all at once."""

from itertools import chain

import numpy as np


def read_numbers(values, shape=(), low=-np.inf, high=np.inf, nan=False):
    """The values of n rows as floats (n, *shape), and the indices of those rows that are not, as they are 0 then.

    A row is numbers in lists of that shape, from low to high, or with `nan` also NaN. true is no number.
    """
    array = _convert(values, shape)
    bad = np.zeros(len(values), bool)
    if array is None:
        rows = [_convert([value], shape) for value in values]
        bad = np.array([row is None for row in rows])
        array = np.concatenate([np.zeros((1, *shape)) if row is None else row for row in rows])
    good = (low <= array) & (array <= high)
    if nan:
        good |= np.isnan(array)
    bad |= ~good.all(tuple(range(1, array.ndim)))
    array[bad] = 0
    return array, np.flatnonzero(bad).tolist()


def _convert(values, shape):
    """Floats (n, *shape), or None where some value is not numbers in lists of that shape."""
    flat = values
    for length in shape:
        if not ({list}.issuperset(map(type, flat)) and {length}.issuperset(map(len, flat))):
            return None
        flat = list(chain.from_iterable(flat))
    if not {int, float}.issuperset(map(type, flat)):
        return None
    try:
        return np.array(flat, float).reshape(len(values), *shape)
    except OverflowError:  # an integer beyond floats
        return None
