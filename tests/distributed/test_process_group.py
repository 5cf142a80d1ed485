"""The environment that srun gives to a rank."""

import pytest

from lomo_ds.distributed.process_group import tasks_on_node

CASES = [("8", [8]), ("8(x2),4", [8, 8, 4]), ("1,16(x3)", [1, 16, 16, 16])]


@pytest.mark.parametrize(("tasks_per_node", "counts"), CASES)
def test_slurms_short_form_of_tasks_per_node(tasks_per_node: str, counts: list[int]) -> None:
    assert [tasks_on_node(tasks_per_node, node) for node in range(len(counts))] == counts
