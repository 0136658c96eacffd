"""Side-by-side measurements of training: counters and ratios against loops written by hand and
against other libraries. `python -m benchmarks` runs all; `--tiny` proves in seconds that they run.
"""
