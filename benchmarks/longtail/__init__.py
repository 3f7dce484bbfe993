"""Long-tail methods compared on one data set: `python -m benchmarks.longtail --help`."""
