"""A whole run of a recipe: launched, prepared, federated and compared, once a seed."""
