"""A little of the campaign of `make fuzz`, with the same seeds every time."""

from __future__ import annotations

import pytest

from tools import ike_fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_no_mutant_gets_anything_but_a_refusal(seed):
    assert ike_fuzz.main(["--seconds", "20", "--executions", "300", "--seed", str(seed)]) == 0
