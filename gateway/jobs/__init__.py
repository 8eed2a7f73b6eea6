"""Jobs of images and videos: what is pushed to workers, and what they call back."""
