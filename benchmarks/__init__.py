"""Benchmarks of the package: what a stateful singleton costs, compared with common alternatives.

Install with ``pip install -e '.[benchmark]'``. ``python -m benchmarks`` runs all parts; ``python -m
benchmarks worker --quick`` runs one part, with fewer repetitions. Absolute figures depend on the
machine and its load. Compare the ratios between variants that took turns within one run.
``--against CHECKOUT`` compares the package with the package of another checkout in the same way.
All parts take about a quarter of an hour. Most of this time is spent in ``worker``, which starts a
worker for each figure.
"""
