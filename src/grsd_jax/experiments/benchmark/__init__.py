"""Times of the operations."""
