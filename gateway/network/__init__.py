"""Which addresses a host name leads to, and which of them are of the public Internet.

Below everything that connects to a place which somebody else chose: providers and workers.
"""
