"""Logarithmic shells of a spectrum, their couplings, and the fits and residuals."""
