"""The replay window against a model that remembers every number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pvpn.esp.replay import WINDOW, ReplayWindow

STEPS = st.lists(
    st.one_of(
        st.just(1),
        st.just(1),
        st.integers(-20, 20),
        st.integers(-WINDOW - 5, WINDOW + 5),
        st.sampled_from([-WINDOW, -WINDOW + 1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW]),
    ),
    max_size=120,
)


class Model:
    """A set of everything that came."""

    def __init__(self, top: int) -> None:
        self.top, self.start, self.came = top, top, set()

    def fresh(self, number: int) -> bool:
        return number > self.start - 0 and self.top - number < WINDOW and number not in self.came

    def accept(self, number: int) -> None:
        self.came.add(number)
        self.top = max(self.top, number)


@given(STEPS, st.booleans(), st.sampled_from([0, 1, 5000, 2**32 - 10, 2**32 - 1, 2**32, 2**33 - 3]))
def test_the_window_agrees_with_a_set_of_all_numbers(steps, esn, start):
    if not esn:
        start = min(start, 1000)
    window, model = ReplayWindow(esn=esn, top=start), Model(start)
    for step in steps:
        number = max(model.top + step, 0)
        if not esn:
            number = min(number, 2**32 - 1)
        if esn and model.top - number >= WINDOW:
            continue  # appendix A2.2 takes such a number for one of the next subspace; the ICV fails then
        assert window.whole(number & 0xFFFFFFFF) == number
        assert window.fresh(number) == (number > 0 and model.fresh(number))
        if window.fresh(number):
            assert window.accept(number) == (number > model.top)
            model.accept(number)
        assert window.top == model.top


@given(st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_the_estimate_is_that_of_rfc_4303_appendix_a2(top, low):
    # The two cases of RFC 4303 appendix A2.2, written out.
    top_low, top_high = top & 0xFFFFFFFF, top >> 32
    edge = (top_low - WINDOW + 1) & 0xFFFFFFFF
    if top_low >= WINDOW - 1:
        high = top_high if low >= edge else top_high + 1
    else:
        high = top_high - 1 if low >= edge else top_high
    estimate = ReplayWindow(esn=True, top=top).whole(low)
    assert estimate == (high << 32) + low


def test_number_zero_and_numbers_before_the_first_subspace_are_refused():
    assert not ReplayWindow(esn=False).fresh(0)
    window = ReplayWindow(esn=True)
    assert window.whole(0xFFFFFFFF) < 0
    assert not window.fresh(window.whole(0xFFFFFFFF))


def test_without_esn_numbers_do_not_wrap():
    window = ReplayWindow(esn=False, top=2**32 - 2)
    assert window.accept(2**32 - 1)
    assert not window.fresh(window.whole(0))
    assert not window.fresh(window.whole(1))


def test_with_esn_numbers_go_on_past_32_bits():
    window = ReplayWindow(esn=True, top=2**32 - 2)
    for low in (0xFFFFFFFF, 0, 1, 2):
        number = window.whole(low)
        assert window.fresh(number)
        assert window.accept(number)
    assert window.top == 2**32 + 2
    assert not window.fresh(window.whole(0xFFFFFFFF))
