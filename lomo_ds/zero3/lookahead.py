"""Limit on how far the host may request parameters ahead of the device; pure arithmetic, which the planner shares."""

from collections import deque


class LookaheadLimit:
    """Bounds the elements that have been requested but that the device has not used yet.

    A request allocates memory at once, and released memory is free only after the device has used its contents, so a
    host that runs far ahead would fill the device with later layers.

    Args:
        limit_numel: elements that may be outstanding in addition to the current request.

    Attributes:
        request_count: number of requests so far.
    """

    def __init__(self, limit_numel: int) -> None:
        self.limit_numel = limit_numel
        self.request_count = 0
        self.ahead: deque[tuple[int, int]] = deque()  # number of the next request, and elements of this one
        self.ahead_numel = 0

    def request(self, numel: int) -> int | None:
        """Register a request for ``numel`` elements.

        Returns:
            The number of a request, at most this one, that the device must have reached first; None to proceed at once.
        """
        reached = None
        while self.ahead_numel > self.limit_numel:
            reached, earlier_numel = self.ahead.popleft()
            self.ahead_numel -= earlier_numel
        self.request_count += 1
        self.ahead.append((self.request_count, numel))
        self.ahead_numel += numel
        return reached
