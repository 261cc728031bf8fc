"""One round at the server: who is asked, what comes back and is believed, how it is scored."""
