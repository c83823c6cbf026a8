"""Rows of a regression: Gram matrices added up in blocks."""

import pytest
import torch

from compress.pruning.repair import least_squares as regression
from compress.pruning.repair.least_squares import GramSum


@pytest.mark.parametrize("size", [1, 3, 7, 9])
def test_a_gram_matrix_added_up_in_blocks_is_that_of_all_rows(size, monkeypatch):
    monkeypatch.setattr(regression, "_BLOCK", 3)
    rows = torch.randn(20, size, generator=torch.Generator().manual_seed(0))
    added = GramSum(size)
    for batch in rows.split(8):
        added.add(batch)
    found = added.matrix()
    assert found.dtype == torch.float64
    assert torch.allclose(found, found.T)
    assert torch.allclose(found, rows.double().T @ rows.double(), atol=1e-5)
