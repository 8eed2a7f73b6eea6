"""The HTTP side of the gateway: parses, asks the parts below, answers."""
