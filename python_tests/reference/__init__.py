"""The oracle: SINGD in dense float64 with explicit masks, independent of singd_ext."""
