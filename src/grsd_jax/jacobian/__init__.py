"""How the Jacobian of the error is applied: plain differentiation, or factors."""
