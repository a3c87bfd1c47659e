"""A little of the campaign of `make fuzz`, with the same seeds every time, and what it found worth keeping."""

from __future__ import annotations

import pytest

from tools import ike_fuzz


@pytest.mark.parametrize("seed", [1, 2])
def test_no_mutant_gets_anything_but_a_refusal(seed):
    assert ike_fuzz.main(["--seconds", "20", "--executions", "300", "--seed", str(seed)]) == 0


def test_the_corpus_gets_nothing_but_refusals():
    lines = ike_fuzz.CORPUS.read_text().splitlines()
    campaign = ike_fuzz.Campaign(1)
    assert {line.split()[0] for line in lines} == {"parsers", "strangers", "insiders"}
    for line in lines:
        campaign.replay(line)
        assert campaign.line == line
