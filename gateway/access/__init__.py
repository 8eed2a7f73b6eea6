"""Who asks, and what they may do: API keys, users' tokens, the service key."""
