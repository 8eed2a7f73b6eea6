"""Lists that jobs come from: Redis and Upstash. No torch, no flask."""
