"""Theodolite: intervene on training, measure reconstructions, with numbers that mean the same on 1 GPU and on 8."""

__version__ = "0.1.0"
