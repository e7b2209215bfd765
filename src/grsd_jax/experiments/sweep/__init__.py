"""A grid of networks over depth."""
