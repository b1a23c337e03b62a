"""Building blocks of models: linear layers, norms, attention, its kernels and cache, positions."""
