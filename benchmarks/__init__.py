"""Measurements: what our transforms cost beside their peers; `make bench` prints every table."""
