"""Self-training methods, one module each, named as in ``tllib.self_training``."""
