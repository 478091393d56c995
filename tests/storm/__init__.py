"""A storm: a fleet of real workers, bad weather by a seed, and a checker of what they wrote down.

``tasks`` is what the workers run, ``weather`` what is done to them, ``fleet`` does it, ``drill``
puts it together and ``checker`` judges. ``faults`` breaks the package on purpose, to show that
the checker sees it.
"""
