"""``python -m mlip``."""

from mlip.cli import main

main()
