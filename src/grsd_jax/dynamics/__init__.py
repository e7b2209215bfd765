"""Shell dynamics: the energy balance, velocities, flows, and the probe of a training."""
