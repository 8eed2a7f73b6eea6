"""The configuration that a process serves: always one, always with how sure it is of it."""
