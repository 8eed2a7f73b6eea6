"""The prompt gateway: decides what is sent to a worker, and says why.

A program of its own: it talks to workers over HTTP only and imports nothing of theirs.
"""
