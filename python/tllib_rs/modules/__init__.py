"""Building blocks, named as in ``tllib.modules``."""
