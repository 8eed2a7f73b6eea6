"""From a snapshot and a request to messages with their reasons. Pure: no I/O, clock or chance."""
