"""Device and host memory: free bytes, slabs of pinned memory, and transfers between host and device."""
