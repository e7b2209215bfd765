"""Symmetric eigenproblems by block Lanczos: a product in, arrays out."""
