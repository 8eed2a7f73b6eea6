"""Workers over HTTP: who is known, who is well, who is asked, and whether the answer is honest."""
