"""What training is fed."""
