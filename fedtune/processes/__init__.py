"""Processes: started, watched and ended, and how this one ends. Knows nothing of federations."""
