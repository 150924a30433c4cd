"""Times of decode attention on a user's own GPU and shapes, beside the other libraries that are installed.

``cuflash bench`` is its command. A shape and its arrays are in ``inputs``, what is timed and checked in ``measure``,
the other libraries in ``peers``.
"""
