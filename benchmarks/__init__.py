"""benchmarks: ours against plain code that computes the same; no part of the package.

`plain` holds the plain code, `workloads` what is measured, `comparisons` what is compared and the tables of it. The
notebook notebooks/analysis/benchmarks.ipynb runs them.
"""
