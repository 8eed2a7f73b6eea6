"""What a request does, from its values to its answer: resolve, ask a model, fit, record."""
