"""The mathematics of gradpost: update rules, and the loops that run them over flat arrays.

Knows NumPy and Numba; knows no HTTP, no disk format and no session. Kept light to import: nothing
is imported here, and there is no ``__version__`` (another package named ``kernels`` is probed for
one).
"""
