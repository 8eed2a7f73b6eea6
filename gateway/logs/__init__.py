"""The log of requests: writing, retention, questions, and replay."""
