"""Models: who is asked, in which order, for how long; and the catalogue of what exists."""
