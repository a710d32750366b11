"""Measuring a potential: error metrics and tables."""
