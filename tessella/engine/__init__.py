"""The loop and what belongs to a run: config, checkpoints, log, health, evaluation records."""
