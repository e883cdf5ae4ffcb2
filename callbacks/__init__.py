"""What is done to training, and measured of it."""

from theodolite.callbacks.direction_sources import DirectionSource, GradientDifference, HaarRandom
from theodolite.callbacks.gradient_projection import GradientProjectionCallback
from theodolite.callbacks.live_direction import LiveGradientDifference
from theodolite.callbacks.rebound import ReboundCallback
