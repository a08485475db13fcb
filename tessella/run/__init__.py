"""What a run is on disk and in words: its configuration, folder, checkpoints, log and monitor."""
