"""Training with the probe on."""
