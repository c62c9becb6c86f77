"""Everything with sockets: the link, listeners, TLS, NBD front doors, an NBD client, a shaped link.

Guarantees: moves bytes, not requests; what a frame means is the core's affair.
Does not know: jobs, daemons, the command line.
"""
