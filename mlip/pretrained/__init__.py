"""Small trained potentials that come with the package: ``EqCalculator("silicon")``."""
