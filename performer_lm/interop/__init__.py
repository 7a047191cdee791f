"""Other systems' weights, in and out."""
