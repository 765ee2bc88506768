"""The parts of one training step: the two forwards, what counts, accumulated batches, large vocabularies, checks.

Each is one object with one seam, made before the first step; ``module.py`` reads as the paper does and calls them.
What is not asked in every step belongs elsewhere: the run into ``training/``, the models into ``models/``.
"""
