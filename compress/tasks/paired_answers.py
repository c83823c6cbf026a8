"""Paired test of right and wrong answers: two networks, or two epochs of one, on the same images."""

import numpy as np

LEVEL = 0.05


def is_shown_worse(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether fewer images are right after than before, by more than noise (exact McNemar test, 5 %, both sides).

    Args:
        before: (N,) bool, whether each image was right.
        after: (N,) bool, whether it is now.

    >>> lost = np.arange(256) >= 4
    >>> is_shown_worse(np.ones(256, bool), lost), is_shown_worse(np.ones(256, bool), np.arange(256) >= 6)
    (False, True)
    """
    from scipy.stats import binomtest  # scipy takes a second to import

    only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
    if only_before <= only_after:
        return False
    return bool(binomtest(only_before, only_before + only_after).pvalue < LEVEL)
