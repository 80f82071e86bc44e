"""Gradients are computed and optimizers step: the device, who owns which gradient, numbers that are not finite."""
