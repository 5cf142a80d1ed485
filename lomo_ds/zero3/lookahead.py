"""How far a host may be ahead of its device when it asks for parameters: pure numbers, which plans follow too."""

from collections import deque


class LookaheadLimit:
    """Bounds what has been asked for and not been computed with.

    To ask takes memory at once, and what was released gives its memory back no sooner than the device has computed
    with it: a host that is far ahead would fill the device with layers to come.

    Args:
        limit_numel: elements that may be ahead beside those that are asked for now.

    Attributes:
        asked: how many times something has been asked for.
    """

    def __init__(self, limit_numel: int) -> None:
        self.limit_numel = limit_numel
        self.request_count = 0
        self.ahead: deque[tuple[int, int]] = deque()  # number of the ask that comes next, and elements
        self.ahead_numel = 0

    def request(self, numel: int) -> int | None:
        """Ask for so many elements.

        Returns:
            The number of an ask, this one's at most, that the device must have come to first; None if any will do.
        """
        reached = None
        while self.ahead_numel > self.limit_numel:
            reached, earlier_numel = self.ahead.popleft()
            self.ahead_numel -= earlier_numel
        self.request_count += 1
        self.ahead.append((self.request_count, numel))
        self.ahead_numel += numel
        return reached
