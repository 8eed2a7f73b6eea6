"""What is inside the demo models: their vocabularies and their networks."""
