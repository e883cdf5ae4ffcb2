"""Talkative autoencoders: a verbaliser that describes an activation and a reconstructor that reads it back."""
