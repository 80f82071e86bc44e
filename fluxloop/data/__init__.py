"""Batches: where they come from, in which order, with which random numbers, and how a pass is begun and left."""
