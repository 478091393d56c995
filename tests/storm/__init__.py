"""A storm: a fleet of real workers, faults that follow from a seed, and a checker of the result.

- ``tasks`` is the app of the workers. ``peers`` is an app that does the same with other packages.
- ``fault_plan`` decides which faults happen, and when. ``fleet`` carries them out.
- ``drill`` runs a whole storm. ``checker`` reads its notes, and finds the promises that were
  broken.
- ``planted_faults`` breaks the package on purpose, to show that the checker notices it.
"""
