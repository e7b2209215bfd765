"""Everything around the numerics: data, training, records, figures, scripts."""
