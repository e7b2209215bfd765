"""Conditions 1 to 4 of the theory as measurements, and their report."""
