"""What `load` refuses before it measures anything."""

import nets
import pytest

from compress.errors import ModelError
from compress.stages.load import check_precision


def test_weights_that_are_not_float32_are_refused():
    check_precision(nets.build("chain"))
    with pytest.raises(ModelError, match=r"must be float32, got body\.0\.0\.weight torch\.float16"):
        check_precision(nets.build("chain").half())
