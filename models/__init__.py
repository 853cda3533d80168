"""Which models there are, and how they become ready."""
