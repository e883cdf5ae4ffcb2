"""What is done to training, and measured of it."""
