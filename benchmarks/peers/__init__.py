"""One module for each way to do the work; each runs in its own environment."""
