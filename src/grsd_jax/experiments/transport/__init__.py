"""Does energy move as the theory says? Paired trainings, compared at many steps."""
