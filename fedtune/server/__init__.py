"""The server side of a run: rounds, checked updates, durable state."""
