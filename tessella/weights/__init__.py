"""Backbones by name: runs, official checkpoints, networks of libraries; and the initial weights of a run."""
