"""What samples are worth: metrics, distances, bounds on the likelihood, tables and pictures of them."""
