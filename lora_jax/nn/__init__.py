"""The modules of models: linear layers, norms, attention and its kernels, positions."""
