"""Weights of other projects: official checkpoints and pretrained networks of torchvision and timm, in."""
