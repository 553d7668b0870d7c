"""Imported by the process that victims are forked from: all that takes a server seconds to load."""

import gc

from kernels import accumulate, average
from service.warm import warm
from tests.crash import victim  # noqa: F401 - with the whole server

# What the sessions of `models.py` need; each further kernel is seconds for whoever has no cache.
warm(("adam", "nadam", "sgd"), ("F32",))
warm(("rmsprop",), ("F64",))
average.warm("F32")
accumulate.warm(("F32", "BF16"), "F32")
gc.freeze()  # or each collection in a fork would copy all that is here
