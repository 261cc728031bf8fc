"""The arms that a federated run is compared with, on equal data, samples and seeds."""
