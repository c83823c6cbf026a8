"""Strides of network inputs: those that a newly made tensor of the same shape has.

`Tensor.contiguous()` leaves the strides of axes of size 1 alone, so that a permuted batch of one-channel images keeps
those of channels-last memory. PyTorch then computes in channels-last, and `x.view(x.size(0), -1)` of a feature map
fails.
"""

import torch
from torch import Tensor


def standard_strides(tensor: Tensor) -> Tensor:
    """Return a tensor of the same values whose strides are those of a new one; the tensor itself where they are.

    >>> images = torch.zeros(2, 28, 28, 1).permute(0, 3, 1, 2)
    >>> images.contiguous().stride(), standard_strides(images).stride()
    ((784, 1, 28, 1), (784, 784, 28, 1))
    """
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
