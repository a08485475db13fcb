"""The training loop, ranks, checks of numbers, signals, and the benchmark."""
