"""Frozen values that the gateway's parts hand to each other. No I/O, no clock, no library."""
