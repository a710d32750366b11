"""Training: configuration, loss terms, optimizers, one trainer for all models."""
