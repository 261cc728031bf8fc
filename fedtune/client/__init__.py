"""The client side: a live Trainer that trains its part of a round."""
