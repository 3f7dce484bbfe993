"""The tests of the lab: its command line, data, runs, checkpoints and models."""
