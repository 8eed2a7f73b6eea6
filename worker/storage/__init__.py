"""Files and messages that come from outside and go there: no torch, no flask."""
