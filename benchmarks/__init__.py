"""benchmarks: what our code costs and gains on this machine; no part of the package.

`workloads` is what is measured, `profiling` measures it. `against_pixels` compares wavelet levels with pixels
(notebooks/analysis/efficiency.ipynb), `against_plain` ours with `plain` code that computes the same
(notebooks/analysis/benchmarks.ipynb), `peers` this workbook with other libraries (notebooks/analysis/peers.ipynb);
`scale` measures what more and larger images cost (notebooks/analysis/scale.ipynb); `figures` draws all but the peers.
"""
