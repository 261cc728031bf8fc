"""How parameters travel: records, and decorators of Flower's grid."""
