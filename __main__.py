"""``python -m ffnfold``."""

from .cli import main

main(prog_name="ffnfold")
