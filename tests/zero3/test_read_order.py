"""The expected order of reads: that of the previous step, once what is written in between has been written."""

from itertools import islice

from lomo_ds.zero3 import read_order
from lomo_ds.zero3.read_order import ReadOrder


class Named:
    def __init__(self, name: str) -> None:
        self.name = name


ITEMS = {name: Named(name) for name in "abcdef"}
STEP = ["a", "bc", "de", "f", "de", "bc"]  # forward, and backward to the same layers


def run(order: ReadOrder[Named], groups: list[str], writes: str = "") -> None:
    for group in groups:
        order.announce([ITEMS[name] for name in group])
        for name in group:
            order.note_read(ITEMS[name])
    for name in writes:
        order.note_write(ITEMS[name])


def expected(order: ReadOrder[Named], count: int = 100) -> str:
    return "".join(item.name for item in islice(order.upcoming(), count))


def test_the_order_of_the_previous_step_is_expected() -> None:
    order: ReadOrder[Named] = ReadOrder()
    run(order, STEP * 2)
    for _ in range(2):
        for position, group in enumerate(STEP):
            run(order, [group])
            following = "".join(STEP[position + 1 :] + STEP[:position])
            assert expected(order, 4) == following[:4]


def test_the_rest_of_a_group_comes_first() -> None:
    order: ReadOrder[Named] = ReadOrder()
    run(order, STEP * 2)
    order.announce([ITEMS["a"]])
    order.announce([ITEMS["b"], ITEMS["c"]])
    order.note_read(ITEMS["b"])
    assert expected(order, 3) == "cde"


def test_layers_of_several_groups_are_told_apart_by_what_came_before() -> None:
    order: ReadOrder[Named] = ReadOrder()
    forward, backward = ["a", "b", "c", "d", "e", "f"], ["c", "d", "a", "b"]  # layers of two groups
    run(order, (forward + backward) * 2)
    run(order, forward[:4])
    assert expected(order, 2) == "ef"
    run(order, forward[4:] + backward[:2])
    assert expected(order, 2) == "ab"


def test_the_same_order_is_found_again_after_another_one() -> None:
    order: ReadOrder[Named] = ReadOrder()
    run(order, STEP * 2)
    run(order, STEP[:4])  # an evaluation, between two steps
    run(order, STEP[:5])
    assert expected(order, 2) == "bc"


def test_what_is_written_before_it_is_read_is_not_expected_until_then() -> None:
    order: ReadOrder[Named] = ReadOrder()
    run(order, STEP, writes="abcdef")
    run(order, STEP, writes="abcdef")
    run(order, STEP)
    assert expected(order) == ""
    run(order, [], writes="abc")
    assert expected(order) == "abc"
    run(order, [], writes="def")
    assert expected(order) == "abcdefdebc"


def test_a_long_history_is_forgotten() -> None:
    order: ReadOrder[Named] = ReadOrder()
    for _ in range(3 * read_order.HISTORY // 10):
        run(order, STEP)
    assert read_order.HISTORY <= len(order.history) <= 2 * read_order.HISTORY
    assert expected(order, 3) == "abc"
