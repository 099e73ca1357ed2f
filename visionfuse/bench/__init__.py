"""Benchmarks: each suite gates on correctness, then times, then writes `assets/bench/<suite>.csv`."""
