"""How models compute: products, attention and decoder layers in fewer steps than transformers takes, on CPUs and GPUs."""
