"""Wrappers: EnergyModel -> EnergyModel."""
