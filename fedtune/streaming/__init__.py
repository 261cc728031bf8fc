"""Where tensors lie, and how they cross from one process to another."""
