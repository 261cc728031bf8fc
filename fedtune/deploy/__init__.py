"""A federation of real processes: certificates, SuperLink, sites, runs. Loads no torch.

Everything that Flower does itself (TLS, node authentication, run management) is left to its own
commands; this package starts them, checks them, and ends them.
"""
