"""Entry points for Flower; the code is in the installed fedtune."""
