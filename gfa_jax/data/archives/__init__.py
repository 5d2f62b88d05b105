"""Parsers of the official archives of data sets, for `gfa_jax.data.prepare`.

One module for each layout. A parser takes the paths of the archives and returns `base.Contents`;
nothing is extracted to disk, and archives of gigabytes are read as a stream.
"""
