"""Memory of a device and of its host: what is free, pinned slabs, and copies between the two."""
