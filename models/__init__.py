"""Flax NNX modules that own parameters: the decoder, its mixers, and generation."""
