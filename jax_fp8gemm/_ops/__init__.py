"""What users call: FP8 GEMMs, casts, and the recipe around them."""
