"""Backbones by name: runs, official checkpoints, libraries' networks; and runs that start from them."""
