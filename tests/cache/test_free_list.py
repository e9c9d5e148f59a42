"""Free numbers are taken as from a list of all of them, without such a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ulysses_infer.cache.free_list import FreeList


@given(st.integers(0, 12), st.lists(st.integers(-6, 6), max_size=30))
def test_numbers_come_in_the_order_of_a_stack_of_all_of_them(count, changes):
    free, stack, taken = FreeList(count), list(range(count - 1, -1, -1)), []
    for change in changes:
        if change > 0:
            expected = [stack.pop() for _ in range(min(change, len(stack)))]
            assert free.take(change) == expected
            taken += expected
        else:
            returned, taken = taken[:-change], taken[-change:]
            stack += returned
            free.give_all(returned)
        assert len(free) == len(stack)


def test_a_list_of_very_many_numbers_takes_no_memory_for_them():
    free = FreeList(10**18)
    assert free.take(2) == [0, 1]
    free.give(0)
    assert (len(free), free.take(2)) == (10**18 - 1, [0, 2])
