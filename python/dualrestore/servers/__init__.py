"""The daemon: volumes kept open, links and exports served, and the control API over them.

Does not know: how the command line shows what it is told.
"""
