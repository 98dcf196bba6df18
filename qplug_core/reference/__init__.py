"""The definition of correct: plain torch, every scheme, every device, no speed."""
