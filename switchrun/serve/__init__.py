"""A warm model behind HTTP: requests are checked, queued, answered in batches by one thread, and sent back."""
