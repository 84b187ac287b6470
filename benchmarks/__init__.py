"""How fast, against whom: `make bench`, or `python -m benchmarks --help`. docs/performance.md tells what it means."""
