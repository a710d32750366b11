"""Leaf blocks of the models: radial functions, harmonics, sphere grids, layers.

They take plain numbers and tensors and know nothing of graphs or configurations.
"""
