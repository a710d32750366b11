"""From labelled structures to batches of graphs.

``graph`` (what a model reads), ``neighbors``, ``hdf5`` (the file format), ``convert``, ``dataset``,
``loader``, ``transforms``, ``statistics``.
"""
