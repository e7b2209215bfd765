"""What every study shares: data, training, runs, flags and files."""
