"""Real handwritten digits: the 1,797 images of scikit-learn's `load_digits`, of which the last 297 are held out.

They are the test part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998), of 8 x 8
pixels.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

TRAINING = 1500
"""Images that may be trained on; those after them are held out."""


@functools.cache
def load() -> tuple[Tensor, Tensor]:
    """(images fp32 [1797, 1, 8, 8] of ink from 0 to 1, digits int64 [1797])."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def enlarged(images: Tensor, edge: int) -> Tensor:
    """The images [N, 1, 8, 8] at `edge` x `edge` pixels, bilinear."""
    if images.shape[-1] == edge:
        return images
    return F.interpolate(images, size=(edge, edge), mode="bilinear", align_corners=False)


def drawn(count: int, seed: int, step: int, *, of: int = TRAINING) -> Tensor:
    """Numbers of `count` images for `step`, int64, drawn with repetition from (seed, step) alone."""
    return torch.randint(of, (count,), generator=torch.Generator().manual_seed(step + 10**6 * seed))
