"""What a stateful singleton costs, measured side by side with what people use instead.

Install with ``pip install -e '.[benchmark]'``. ``python -m benchmarks`` runs all parts,
``python -m benchmarks worker --quick`` one of them with fewer repetitions. Absolute figures
belong to the machine and the moment; what is worth comparing are the ratios between variants
that took turns within one run. ``--against CHECKOUT`` compares the package with that of another
checkout in the same way. All parts take about a quarter of an hour, nearly all of it in
``worker``, which starts a worker for each figure.
"""
