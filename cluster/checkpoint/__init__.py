"""Training state that survives a restart of everything: written by many actors, committed at once, verified on load."""
